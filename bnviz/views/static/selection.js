// One selection for the whole page, on one bus: cells of a notebook, the side panel and a report behave alike, with no kernel.
// A drawing translates: rows of its data to an address, an address to rows. It never calls another drawing.

const COORDINATES = ['layer', 'head', 'kv_head', 'expert', 'token'];

const columnsOf = source => {
  const data = source.data;
  const has = name => (data instanceof Map ? data.has(name) : name in data);
  const get = name => (data instanceof Map ? data.get(name) : data[name]);
  return { names: COORDINATES.filter(has), get, path: has('path') ? get('path') : null };
};

/** The address of row `i`: negative and missing coordinates are parts it does not have. */
function addressOf({ names, get, path }, i) {
  const address = {};
  for (const name of names) if (Number.isFinite(get(name)[i]) && get(name)[i] >= 0) address[name] = Number(get(name)[i]);
  if (path && path[i]) address.path = String(path[i]);
  return address;
}

const within = (inner, outer) => inner === outer || inner.startsWith(outer + '.');

/** Whether two addresses may mean the same place: nothing they both have differs. Paths decide where no coordinate is shared. */
function meet(a, b) {
  if (a.run !== undefined && b.run !== undefined && a.run !== b.run) return false;
  const shared = COORDINATES.filter(name => name in a && name in b);
  if (shared.length) return shared.every(name => a[name] === b[name]);
  return Boolean(a.path && b.path && (within(a.path, b.path) || within(b.path, a.path)));
}

const rowsOf = (columns, chosen) => {
  const length = columns.names.length ? columns.get(columns.names[0]).length : (columns.path?.length ?? 0);
  const rows = [];
  for (let i = 0; i < length; i++) {
    const address = addressOf(columns, i);
    if (chosen.some(one => meet(one, address))) rows.push(i);
  }
  return rows;
};

const sameAddress = (a, b) => JSON.stringify(Object.entries(a).sort()) === JSON.stringify(Object.entries(b).sort());

/** Gives the bus `chosen`, `select(address | [address], {add, toggle, from})`, `clear()`. */
function selecting(bus) {
  bus.chosen = [];
  bus.select = (addresses, { add = false, toggle = false, from = null } = {}) => {
    const wanted = (Array.isArray(addresses) ? addresses : [addresses]).filter(one => Object.keys(one).length);
    const again = toggle && wanted.length === bus.chosen.length && wanted.every((one, i) => sameAddress(one, bus.chosen[i]));
    const kept = add ? bus.chosen.filter(one => !wanted.some(two => sameAddress(one, two))) : [];
    bus.chosen = again ? [] : [...kept, ...wanted];
    bus.dispatchEvent(new CustomEvent('select', { detail: { chosen: bus.chosen, from } }));
  };
  bus.clear = () => bus.select([]);
  /**
   * Take a Bokeh document in, before or after it is drawn into `element`; returns what takes it out again.
   * `run` is part of every address of the document, in a page that shows several runs.
   */
  bus.adopt = (doc, element = null, run = null) => adopt(bus, doc, element, run);
}

/** "Selected: layer 1, head 3 · model.layers.1.self_attn" */
function inWords(chosen) {
  if (!chosen.length) return '';
  const one = chosen.at(-1);
  const place = COORDINATES.filter(name => name in one).map(name => `${name.replace('_', ' ')} ${one[name]}`).join(', ');
  const more = chosen.length > 1 ? ` and ${chosen.length - 1} more` : '';
  return [one.run, place, one.path].filter(Boolean).join(' · ') + more;
}

/** The address as Python, to go on with in the notebook. */
function asPython(address, record) {
  const at = COORDINATES.filter(name => name in address).map(name => `${name}=${address[name]}`).join(', ');
  return at ? `run[${JSON.stringify(record)}].sel(${at})` : `model.get_submodule(${JSON.stringify(address.path ?? '')})`;
}

/** Cells of an image have no rows: a click is arithmetic, and the outline is a rectangle of its own. */
function cellsOf(plot) {
  const cursor = (plot.renderers ?? []).map(r => r.data_source).find(source => source?.name === 'bnviz-cursor');
  return cursor ? { cursor, ...Object.fromEntries(Object.entries(cursor.tags[0])) } : null;
}

function outline({ cursor, cells, counts, paths }, chosen) {
  const boxes = { cx: [], cy: [], width: [], height: [] };
  for (const one of chosen) {
    const at = cells.map(name => one[name]);
    if (at[0] === undefined && at[1] === undefined) continue;
    if (at.some((v, i) => v !== undefined && v >= counts[i])) continue;
    boxes.cx.push(at[0] ?? (counts[0] - 1) / 2);
    boxes.cy.push(at[1] ?? (counts[1] - 1) / 2);
    boxes.width.push(at[0] === undefined ? counts[0] : 1);
    boxes.height.push(at[1] === undefined ? counts[1] : 1);
  }
  cursor.data = boxes;
}

function adopt(bus, doc, element, run) {
  const undo = [];
  const here = address => (run === null || !Object.keys(address).length ? address : { ...address, run });
  const mine = () => bus.chosen.filter(one => run === null || one.run === undefined || one.run === run);
  let busy = false;
  let heard = 0;
  const changed = new Map();
  const models = modelsOf(doc);
  const sources = models.filter(m => m.type === 'ColumnDataSource' && m.name !== 'bnviz-cursor');
  const places = sources.filter(s => { const c = columnsOf(s); return c.names.length || c.path; });
  const images = models.filter(m => m.tags?.some?.(tag => String(tag).startsWith('bnviz-cells:')));

  const settle = () => { // a click changes several sources, one after the other: read them together
    heard += 1;
    const picked = [...changed].filter(([, rows]) => rows.length);
    changed.clear();
    bus.select(picked.flatMap(([source, rows]) => rows.map(i => here(addressOf(columnsOf(source), i)))), { from: doc });
  };
  for (const source of places) {
    const note = () => {
      if (busy) return;
      if (!changed.size) queueMicrotask(settle);
      const { indices, line_indices } = source.selected;
      changed.set(source, indices.length ? [...indices] : [...(line_indices ?? [])]);
    };
    for (const name of ['indices', 'line_indices']) {
      const signal = source.selected.properties[name]?.change;
      signal?.connect(note);
      undo.push(() => signal?.disconnect(note));
    }
  }
  // A click on what is selected already changes nothing in Bokeh: that is the second click, and it clears.
  for (const plot of models.filter(m => m.renderers?.some?.(r => places.includes(r.data_source)))) {
    plot.on_event('tap', event => {
      const before = heard;
      if (!event.modifiers?.shift) setTimeout(() => heard === before && bus.chosen.length && bus.clear());
    });
  }
  for (const plot of images) {
    const at = cellsOf(plot);
    plot.on_event('tap', event => {
      const [i, j] = [Math.round(event.x), Math.round(event.y)];
      if (i < 0 || j < 0 || i >= at.counts[0] || j >= at.counts[1]) return;
      const address = { [at.cells[0]]: i, [at.cells[1]]: j };
      if (at.paths[i]) address.path = at.paths[i];
      bus.select(here(address), { add: event.modifiers?.shift, toggle: true, from: doc });
    });
  }
  const show = () => {
    busy = true;
    for (const source of places) {
      const rows = rowsOf(columnsOf(source), mine());
      if (!same(rows, source.selected.indices)) source.selected.indices = rows;
    }
    for (const plot of images) outline(cellsOf(plot), mine());
    busy = false;
  };
  bus.addEventListener('select', show);
  undo.push(() => bus.removeEventListener('select', show));
  if (element) {
    const press = event => steer(bus, models, event, here);
    element.addEventListener('keydown', press);
    undo.push(() => element.removeEventListener('keydown', press));
  }
  bus.documents.add(doc);
  undo.push(() => bus.documents.delete(doc));
  for (const model of models) dress(model, bus.theme === 'dark');
  if (bus.chosen.length) show();
  return () => undo.forEach(act => act());
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1], PageUp: [0, 10], PageDown: [0, -10] };

/** The marks of a drawing that can be stepped through: renderers with a place and positions, in the order drawn. */
function marksOf(models) {
  const found = [];
  for (const plot of models.filter(m => m.renderers && m.x_range)) {
    for (const renderer of plot.renderers) {
      const { glyph, data_source: source } = renderer;
      if (!source || renderer.tags?.includes('bnviz-outline') || source.name === 'bnviz-cursor') continue;
      const columns = columnsOf(source);
      const [x, y] = [glyph.x?.field, (glyph.y ?? glyph.top)?.field];
      if ((columns.names.length || columns.path) && x) found.push({ plot, columns, x: columns.get(x), y: y && columns.get(y), bars: !glyph.y });
    }
  }
  return found;
}

function nearest({ plot, x, y, bars }, from, [right, up]) {
  const sign = range => (range.start > range.end ? -1 : 1);
  const step = [right * sign(plot.x_range), up * sign(plot.y_range)];
  const [values, others, way] = step[0] ? [x, y, Math.sign(step[0])] : [y, x, Math.sign(step[1])];
  if (!values || (bars && !step[0])) return from;
  let at = from;
  for (let n = Math.abs(step[0] || step[1]); n > 0; n--) {
    let best = -1, least = Infinity;
    for (let i = 0; i < values.length; i++) {
      const along = (values[i] - values[at]) * way;
      const aside = others && !bars ? Math.abs(others[i] - others[at]) : 0;
      if (along > 1e-9 && along + 1000 * aside < least) [best, least] = [i, along + 1000 * aside];
    }
    if (best < 0) break;
    at = best;
  }
  return at;
}

/** Arrows, Home, End and the Page keys move the selection by marks, in the drawing's directions. */
function steer(bus, models, event, here) {
  if (!(event.key in ARROWS) && event.key !== 'Home' && event.key !== 'End' && event.key !== 'Enter') return;
  const marks = marksOf(models);
  if (!marks.length) return;
  const at = bus.chosen.at(-1);
  let mark = marks[0], row = -1;
  for (const one of at ? marks : []) {
    const rows = rowsOf(one.columns, [at]);
    if (rows.length) { [mark, row] = [one, rows[0]]; break; }
  }
  const last = mark.x.length - 1;
  const next = event.key === 'Home' || row < 0 ? 0 : event.key === 'End' ? last : event.key === 'Enter' ? row : nearest(mark, row, ARROWS[event.key]);
  if (last >= 0) bus.select(here(addressOf(mark.columns, next)), { add: event.shiftKey });
  event.preventDefault();
}
