// One Bokeh document of the kernel, shown in a cell and mirrored both ways; `model` is anywidget's.
// A first, hidden widget brings BokehJS; pages it does not reach ask for it.

const libraries = (globalThis[Symbol.for('bnviz.bokeh')] ??= new Map()); // version -> {promise, resolve}

const loaded = version => (window.Bokeh?.version === version ? window.Bokeh : window.Bokeh?.[version]);

function library(version) {
  let slot = libraries.get(version);
  if (!slot) {
    slot = {};
    slot.promise = new Promise(resolve => (slot.resolve = resolve));
    libraries.set(version, slot);
  }
  return slot;
}

// A DataView or an ArrayBuffer, as an ArrayBuffer of its own.
const buffer = v => (v instanceof ArrayBuffer ? v : v.buffer.slice(v.byteOffset, v.byteOffset + v.byteLength));

function execute(text) {
  const script = document.createElement('script');
  script.textContent = text;
  document.head.append(script);
  script.remove();
}

// BokehJS, once a version, and the script of bnviz's pages: the theme of drawings and the one selection.
async function install(version, packed, page) {
  const slot = library(version);
  if (slot.installing) return;
  slot.installing = true;
  if (!loaded(version)) {
    const stream = new Blob([buffer(packed)]).stream().pipeThrough(new DecompressionStream('gzip'));
    execute(await new Response(stream).text());
  }
  execute(page);
  slot.resolve(loaded(version));
}

const bus = () => globalThis[Symbol.for('bnviz')];

// A colour that changed in the page is the theme's doing, and none of the kernel's business.
const themed = event => /(color|palette)$/.test(event.attr ?? '') && event.model.type !== 'ColorPicker';

const named = (ids, buffers) => new Map(ids.map((id, i) => [id, buffer(buffers[i])]));

// The kernel's patches since the snapshot this page holds, so that a second showing of the same widget starts where the
// first one is. Past MOST of them the page asks for a new snapshot.
const MOST = 500;

class Story {
  constructor(model) {
    this.model = model;
    this.patches = [];
    this.mirrors = new Set();
    model.on('msg:custom', (message, buffers) => {
      if (message.kind === 'library') install(model.get('_bokeh'), buffers[0], message.page);
      else this.add({ ...message, buffers });
    });
    model.on('change:_document', () => {
      const { sent } = model.get('_document');
      this.patches = this.patches.filter(patch => patch.sent > sent);
      this.asked = false;
    });
  }

  add(patch) {
    this.patches.push(patch);
    for (const mirror of this.mirrors) mirror.apply(patch);
    if (this.patches.length > MOST && !this.asked) {
      this.asked = true;
      this.model.send({ kind: 'snapshot' });
    }
  }
}

// One showing of the document: the kernel's patches go in, the page's own come out.
class Mirror {
  constructor(model) {
    this.model = model;
    this.me = Math.random().toString(36).slice(2); // crypto.randomUUID needs https
    this.quiet = false; // while the kernel's word is applied nothing is sent back
  }

  async show(bokeh, el, patches) {
    const { json, ids, buffers, sent } = this.model.get('_document');
    const { Document } = bokeh.require('document');
    this.sent = sent;
    this.doc = Document.from_json(JSON.parse(json), undefined, named(ids, buffers));
    for (const patch of patches) this.apply(patch);
    el.classList.add('bnviz-view');
    this.release = bus()?.adopt?.(this.doc, el);
    await bokeh.embed.add_document_standalone(this.doc, el);
    this.doc.on_change(event => {
      if (this.quiet || themed(event)) return;
      const patch = JSON.stringify(this.doc.create_json_patch([event]));
      this.model.send({ kind: 'patch', from: this.me, json: patch });
    });
  }

  apply({ sent, from, json, ids, buffers }) {
    if (sent <= this.sent || from === this.me) return;
    this.sent = sent;
    this.silently(() => this.doc.apply_json_patch(JSON.parse(json), named(ids, buffers)));
    if (bus()?.theme === 'dark') bus().retheme('dark');
  }

  dispose() {
    this.release?.();
    this.silently(() => this.doc?.clear({ sync: false }));
  }

  silently(act) {
    this.quiet = true;
    try {
      act();
    } finally {
      this.quiet = false;
    }
  }
}

async function render(story, { model, el, signal }) {
  const version = model.get('_bokeh');
  if (!library(version).installing) model.send({ kind: 'library' }); // the hidden widget did not reach this page
  const bokeh = await library(version).promise;
  if (signal?.aborted) return undefined;
  if (!bokeh) {
    el.textContent = 'Figures need JavaScript that this page does not allow to run.';
    return undefined;
  }
  const mirror = new Mirror(model);
  story.mirrors.add(mirror);
  await mirror.show(bokeh, el, story.patches);
  return () => {
    story.mirrors.delete(mirror);
    mirror.dispose();
  };
}

export default () => {
  let story = null;
  return {
    initialize({ model }) {
      const packed = model.get('_library');
      if (packed?.byteLength) install(model.get('_bokeh'), packed, model.get('_page'));
      else story = new Story(model);
    },
    render: context => render(story, context)
  };
};
