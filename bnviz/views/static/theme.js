// The theme: Python writes the light colours; this swaps them token for token, in every Bokeh document that was adopted.
// THEMES is put in front by Python: {light: {token: colour}, dark: {...}, maps: {name: {light: [256], dark: [256]}}}.
// A colour is found by its name in the model (..color, ..palette) and by its value; it is never in a data column.

const toDark = new Map(Object.keys(THEMES.light).map(token => [THEMES.light[token], THEMES.dark[token]]));
const wanted = /(color|palette)$/;

/** What a Bokeh colour property held when it was light, and what was last put there: so a colour that the kernel changes is seen. */
const written = new WeakMap();

const swapped = (colour, dark) => (dark && typeof colour === 'string' && toDark.get(colour)) || colour;

function inTheme(light, dark) {
  if (typeof light === 'string') return swapped(light, dark);
  if (Array.isArray(light)) return light.map(colour => swapped(colour, dark));
  if (light && typeof light === 'object' && typeof light.value === 'string') return { ...light, value: swapped(light.value, dark) };
  return light;
}

const same = (a, b) => a === b || JSON.stringify(a) === JSON.stringify(b);

function dress(model, dark) {
  const map = (model.tags ?? []).find(tag => typeof tag === 'string' && tag.startsWith('bnviz-map:'))?.slice(10);
  if (map && THEMES.maps[map]) {
    model.setv({ palette: THEMES.maps[map][dark ? 'dark' : 'light'] });
    return;
  }
  if (map) return; // cividis reads on both
  let memory = written.get(model);
  if (!memory) written.set(model, (memory = {}));
  const changes = {};
  for (const property of model) {
    const name = property.attr;
    if (!wanted.test(name) || property.is_unset) continue;
    const now = property.get_value();
    if (now == null) continue;
    const known = memory[name];
    const light = known && same(known.shown, now) ? known.light : now;
    const shown = inTheme(light, dark);
    memory[name] = { light, shown };
    if (!same(shown, now)) changes[name] = shown;
  }
  if (Object.keys(changes).length) model.setv(changes);
}

const modelsOf = doc => [...(doc._all_models?.values() ?? [])];

/** The theme the page asks for: JupyterLab's on the body, else a choice made on the page, else the system's. */
function preferredTheme() {
  const lab = document.body?.dataset.jpThemeLight;
  if (lab !== undefined) return lab === 'false' ? 'dark' : 'light';
  const asked = new URLSearchParams(location.search).get('theme');
  if (asked === 'dark' || asked === 'light') return asked;
  return matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';
}

/** Gives the bus `theme`, `retheme(name)` and the memory of adopted documents. */
function themed(bus) {
  bus.documents = new Set();
  bus.theme = preferredTheme();
  bus.retheme = (name = preferredTheme()) => {
    bus.theme = name;
    document.documentElement.dataset.bnvizTheme = name;
    for (const doc of bus.documents) for (const model of modelsOf(doc)) dress(model, name === 'dark');
    bus.dispatchEvent(new CustomEvent('theme', { detail: name }));
  };
  document.documentElement.dataset.bnvizTheme = bus.theme;
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => bus.retheme());
  if (document.body) {
    new MutationObserver(() => bus.retheme()).observe(document.body, { attributeFilter: ['data-jp-theme-light'] });
  }
  let before = null;
  addEventListener('beforeprint', () => {
    before = bus.theme;
    if (before === 'dark') bus.retheme('light');
  });
  addEventListener('afterprint', () => {
    if (before === 'dark') bus.retheme('dark');
  });
}
