// A page of bnviz inside a notebook's output: as tall as it needs, in the notebook's theme, with the notebook's selection.
// Runs before the page's own scripts. Where the frame may not see the notebook (another origin) it is a page like any other.
(() => {
  const frame = window.frameElement;
  if (!frame) return;
  const root = document.documentElement;
  root.dataset.embedded = 'notebook';

  // One selection for all outputs of a notebook: the bus is the notebook window's.
  const bus = Symbol.for('bnviz');
  try {
    window[bus] = window.parent[bus] ??= new window.parent.EventTarget();
  } catch {
    // the page makes its own
  }

  // The plain findings beside the frame are for readers whose front end takes frames or scripts away.
  const still = frame.nextElementSibling;
  if (still?.classList.contains('bnviz-still')) still.hidden = true;

  // JupyterLab and Notebook say which theme they show, VS Code with a class; elsewhere the background tells.
  const host = frame.ownerDocument.body;
  const dark = () => {
    if (host.dataset.jpThemeLight) return host.dataset.jpThemeLight === 'false';
    if (/\bvscode-(dark|high-contrast)\b/.test(host.className)) return !/\bvscode-high-contrast-light\b/.test(host.className);
    const [r, g, b, a = 1] = (getComputedStyle(host).backgroundColor.match(/[\d.]+/g) ?? [255, 255, 255]).map(Number);
    return a > 0.5 && 0.299 * r + 0.587 * g + 0.114 * b < 128;
  };
  const follow = () => {
    root.dataset.theme = dark() ? 'dark' : 'light';
  };
  follow();
  const watch = new MutationObserver(follow);
  watch.observe(host, { attributes: true, attributeFilter: ['data-jp-theme-light', 'data-jp-theme-name', 'class'] });
  window.addEventListener('pagehide', () => watch.disconnect());

  // Tall enough for the page, at most as tall as the window lets it be read; a height set by hand is kept.
  let set = '';
  const fit = () => {
    if (frame.style.height !== set && set) return;
    const most = Math.max(480, 0.8 * window.parent.innerHeight);
    const body = document.body.getBoundingClientRect();
    set = `${Math.ceil(Math.min(most, body.height + 2 * Math.max(0, body.top + window.scrollY)))}px`;
    frame.style.height = set;
  };
  document.addEventListener('DOMContentLoaded', () => {
    new ResizeObserver(fit).observe(document.body);
    fit();
  });
})();
