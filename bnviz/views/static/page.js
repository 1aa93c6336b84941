// A saved report: draws its figures when they come near, and connects findings, keys, the status line and the address bar.

const IDLE = 'Select a mark or a finding: all figures show the same place.';
const WORDS = ['path', 'run'];
const byId = id => document.getElementById(id);

async function inflate(id) {
  const raw = Uint8Array.from(atob(byId(id).textContent), c => c.charCodeAt(0));
  return new Response(new Blob([raw]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
}

function loadBokeh() {
  loadBokeh.once ??= inflate('bokeh').then(text => {
    const script = document.createElement('script');
    script.textContent = text;
    document.head.append(script);
  });
  return loadBokeh.once;
}

/** Draw one figure: the document is dressed for the theme before anything is on the screen. */
async function draw(bus, holder) {
  if (holder.dataset.state) return;
  holder.dataset.state = 'drawing';
  try {
    await loadBokeh();
    const item = JSON.parse(await inflate(holder.dataset.doc));
    const doc = Bokeh.require('document').Document.from_json(item.doc);
    bus.adopt(doc, holder, holder.dataset.run ?? null);
    await Bokeh.embed.add_document_standalone(doc, holder);
    holder.dataset.state = 'drawn';
  } catch (error) {
    holder.dataset.state = 'failed';
    holder.textContent = `This figure could not be drawn: ${error.message}. The findings and tables do not need it.`;
    throw error;
  }
}

/** Figures within 600 px of the view first; the rest when the browser is idle, so that a print is complete. */
function drawLazily(bus) {
  const holders = [...document.querySelectorAll('[data-doc]')];
  let turn = Promise.resolve();
  const queue = holder => (turn = turn.then(() => draw(bus, holder)).catch(error => console.error(error)));
  const near = new IntersectionObserver(entries => entries.filter(e => e.isIntersecting).forEach(e => { near.unobserve(e.target); queue(e.target); }), { rootMargin: '600px' });
  holders.forEach(holder => near.observe(holder));
  const idle = act => (globalThis.requestIdleCallback ? requestIdleCallback(act, { timeout: 100 }) : setTimeout(act, 50));
  const rest = () => {
    const next = holders.find(holder => !holder.dataset.state);
    if (!next) return turn.then(() => (document.documentElement.dataset.ready = '1'));
    return queue(next).then(() => idle(rest));
  };
  addEventListener('load', () => setTimeout(() => idle(rest), 100));
}

/** Where of a finding holds numbers or lists of them: lists are several places. */
function addressesOf(where) {
  const length = Math.max(1, ...Object.values(where).filter(Array.isArray).map(list => list.length));
  return Array.from({ length }, (_, i) =>
    Object.fromEntries(Object.entries(where).map(([k, v]) => [k, Array.isArray(v) ? v[Math.min(i, v.length - 1)] : v])));
}

function connectFindings(bus) {
  const rows = [...document.querySelectorAll('.finding[data-where]')];
  const act = (row, event) => {
    if (event.target.closest('a, code')) return;
    const addresses = addressesOf(JSON.parse(row.dataset.where));
    if (Object.keys(addresses[0]).length) bus.select(addresses, { toggle: true, add: event.shiftKey });
    if (bus.chosen.length) byId(row.dataset.section)?.scrollIntoView({ block: 'nearest' });
  };
  for (const row of rows) row.addEventListener('click', event => act(row, event));
  bus.addEventListener('select', ({ detail }) => {
    for (const row of rows) {
      const its = addressesOf(JSON.parse(row.dataset.where));
      const on = detail.chosen.length > 0 && its.every(one => detail.chosen.some(two => sameAddress(one, two)));
      row.classList.toggle('on', on);
      row.querySelector('.what').setAttribute('aria-pressed', String(on));
    }
  });
}

/** The selection in words, in a live region, and in the address bar, so that a colleague opens what you saw. */
function tellSelection(bus) {
  const status = byId('status');
  let told = '';
  bus.addEventListener('select', ({ detail }) => {
    const words = inWords(detail.chosen);
    status.textContent = words ? `Selected: ${words} · Esc clears` : IDLE;
    const one = detail.chosen.at(-1) ?? {};
    const parts = COORDINATES.filter(name => name in one).map(name => [name, one[name]]);
    const named = parts.length || !one.path ? parts : [['path', one.path]];
    told = new URLSearchParams(one.run === undefined ? named : [['run', one.run], ...named]).toString();
    try {
      history.replaceState(null, '', told ? `#${told}` : location.pathname + location.search);
    } catch { /* some viewers forbid it; the page works without */ }
  });
  const read = () => {
    const text = location.hash.slice(1);
    if (!text.includes('=') || text === told) return;
    const given = [...new URLSearchParams(text)].filter(([k, v]) => WORDS.includes(k) || (COORDINATES.includes(k) && /^\d+$/.test(v)));
    bus.select(Object.fromEntries(given.map(([k, v]) => [k, WORDS.includes(k) ? v : Number(v)])));
  };
  addEventListener('hashchange', read);
  read();
}

function connectKeys(bus) {
  const copy = async () => {
    const at = bus.chosen.at(-1);
    if (!at) return;
    const record = document.activeElement?.closest('[data-record]')?.dataset.record ?? 'attention';
    const text = asPython(at, record);
    try { await navigator.clipboard.writeText(text); byId('status').textContent = `Copied: ${text}`; }
    catch { byId('status').textContent = text; }
  };
  addEventListener('keydown', event => {
    if (event.target.closest?.('input, select, textarea')) return;
    if (event.key === 'Escape') bus.chosen.length ? bus.clear() : document.activeElement?.blur();
    if (event.key === 'c' && !event.ctrlKey && !event.metaKey && !event.altKey && !String(getSelection())) copy();
  });
}

function connectTheme(bus) {
  const button = byId('theme');
  const name = () => (button.textContent = bus.theme === 'dark' ? 'Light theme' : 'Dark theme');
  button.hidden = false;
  button.addEventListener('click', () => bus.retheme(bus.theme === 'dark' ? 'light' : 'dark'));
  bus.addEventListener('theme', name);
  name();
}

function startReport(bus) {
  document.documentElement.dataset.script = '1';
  byId('status').textContent = IDLE;
  connectTheme(bus);
  connectFindings(bus);
  connectKeys(bus);
  drawLazily(bus);
  tellSelection(bus);
}
