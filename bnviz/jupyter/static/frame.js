// A page of bnviz inside a notebook's output: in the notebook's theme, with the notebook's selection, as tall as it needs.
// Runs at the start of the body, before the page's own script. Where the frame may not see the notebook (another origin) it is
// a page like any other.
(() => {
  const frame = window.frameElement;
  if (!frame) return;
  const notebook = window.parent;
  const host = frame.ownerDocument.body;
  document.documentElement.dataset.embedded = 'notebook';

  // JupyterLab and Notebook say which theme they have, VS Code with a class; elsewhere the background tells. The page follows
  // the word on its own body as it would in JupyterLab itself.
  const dark = () => {
    if (host.dataset.jpThemeLight) return host.dataset.jpThemeLight === 'false';
    if (host.classList.contains('vscode-high-contrast-light')) return false;
    if (host.classList.contains('vscode-dark') || host.classList.contains('vscode-high-contrast')) return true;
    const [r, g, b, a = 1] = notebook.getComputedStyle(host).backgroundColor.match(/[\d.]+/g).map(Number);
    return a > 0.5 && 0.299 * r + 0.587 * g + 0.114 * b < 128;
  };
  const follow = () => {
    document.body.dataset.jpThemeLight = String(!dark());
  };
  follow();
  const watch = new MutationObserver(follow);
  watch.observe(host, { attributeFilter: ['data-jp-theme-light', 'class'] });

  // One selection for all outputs of the notebook: the page's bus and the notebook window's tell each other.
  const BUS = Symbol.for('bnviz');
  const shared = (notebook[BUS] ??= new notebook.EventTarget());
  let bus = null;
  const hear = ({ detail }) => {
    if (detail.from !== window) bus?.select(detail.chosen.map(one => ({ ...one })), { from: shared });
  };
  const tell = ({ detail }) => {
    if (detail.from === shared) return;
    const chosen = structuredClone(detail.chosen);
    if (shared.select) shared.select(chosen, { from: window });
    else shared.dispatchEvent(new notebook.CustomEvent('select', { detail: { chosen, from: window } }));
  };
  const connect = () => {
    bus = window[BUS];
    bus?.addEventListener('select', tell);
    shared.addEventListener('select', hear);
  };

  // Tall enough for the page, but not taller than a window lets it be read; a height set by hand is kept.
  let given = '';
  const fit = () => {
    if ('fixed' in frame.dataset) return; // a tab has a height of its own
    if (given && frame.style.height !== given) return;
    const most = Math.max(480, 0.8 * notebook.innerHeight);
    given = `${Math.ceil(Math.min(most, document.documentElement.getBoundingClientRect().height))}px`;
    frame.style.height = given;
  };

  document.addEventListener('DOMContentLoaded', () => {
    // The plain findings beside the frame are for readers whose front end takes frames or scripts away.
    const still = frame.nextElementSibling;
    if (still?.classList.contains('bnviz-still')) still.hidden = true;
    connect();
    new ResizeObserver(fit).observe(document.documentElement);
    fit();
  });
  // Inside the frame where it scrolls, so that the status line stays in view; in the notebook where it does not.
  const show = place => {
    if (!place) return;
    const above = parseFloat(getComputedStyle(document.documentElement).scrollPaddingTop) || 0;
    if (document.documentElement.scrollHeight <= innerHeight + 1) place.scrollIntoView();
    else window.scrollTo({ top: place.getBoundingClientRect().top + window.scrollY - above });
  };

  // In a frame made of text a link to a place of the page would load the notebook into the frame, and one to elsewhere the site.
  document.addEventListener('click', event => {
    const link = event.target.closest?.('a[href]');
    const to = link?.getAttribute('href');
    if (!to) return;
    if (to.startsWith('#')) {
      event.preventDefault();
      show(document.getElementById(decodeURIComponent(to.slice(1))));
    } else {
      link.target = '_blank';
      link.rel = 'noopener';
    }
  });

  window.addEventListener('pagehide', () => {
    watch.disconnect();
    shared.removeEventListener('select', hear);
  });
})();
