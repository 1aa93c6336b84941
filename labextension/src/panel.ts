import { TranslationBundle } from '@jupyterlab/translation';
import { LabIcon } from '@jupyterlab/ui-components';
import { Widget } from '@lumino/widgets';

import { h, replace } from './dom';
import { IPanelActs, KernelView } from './kernelview';
import { KernelLink } from './link';
import { inWords, onSelect, select } from './selection';
import { LinkTracker } from './tracker';

export type Shown = KernelLink['phase'] | 'no-place' | 'no-kernel' | 'held';

const LOADABLE: Shown[] = ['unasked', 'absent', 'stale'];

/** The side panel: the kernel of the notebook or console in view, and how to mend it where it can't be looked at. */
export class BnvizPanel extends Widget {
  constructor(
    private readonly tracker: LinkTracker,
    private readonly trans: TranslationBundle,
    icon: LabIcon,
    private readonly acts: IPanelActs
  ) {
    super();
    this.id = 'bnviz-panel';
    this.addClass('bnviz-Panel');
    this.title.icon = icon;
    this.title.caption = trans.__('bnviz: what holds the model back');
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', trans.__('bnviz'));
    this.node.append(
      h('div', { class: 'bnviz-Header' }, h('span', { class: 'bnviz-Dot', 'aria-hidden': true }), this.status),
      this.chosen,
      this.note,
      this.body
    );
    tracker.changed.connect(this.follow, this);
    this.stopHearing = onSelect(chosen => this.choose(inWords(chosen, trans)));
    this.follow();
  }

  /** Whether bnviz may be loaded in the kernel in view. */
  get loadable(): boolean {
    return LOADABLE.includes(this.shown);
  }

  /** Run `%load_ext bnviz` in the kernel in view. */
  async load(): Promise<void> {
    const link = this.tracker.current;
    if (!link || !this.loadable || this.loading.has(link)) {
      return;
    }
    this.said = '';
    this.loading.add(link);
    this.render();
    const said = await this.loaded(link);
    this.loading.delete(link);
    if (!said) {
      void link.open();
    }
    if (link === this.link) {
      this.said = said;
      this.render();
    }
  }

  /** Why it was not loaded; empty where it was. */
  private async loaded(link: KernelLink): Promise<string> {
    const { trans } = this;
    try {
      const done = await link.kernel.requestExecute({ code: '%load_ext bnviz', store_history: false }).done;
      const { status, ename, evalue } = done.content as { status: string; ename?: string; evalue?: string };
      if (status === 'error') {
        return ename === 'ModuleNotFoundError'
          ? trans.__('bnviz is not installed in this kernel. Run: %pip install bnviz')
          : `${ename}: ${evalue}`;
      }
      return status === 'ok'
        ? ''
        : trans.__('The cell before it failed, and the kernel did not load bnviz. Press again.');
    } catch {
      return trans.__('The kernel was stopped.');
    }
  }

  /** Watch the one model that there is while the next cell runs; of several, the panel shows which. */
  watchNext(): void {
    if (this.link && this.shown === 'live') {
      this.view?.watchNext();
    }
  }

  get shown(): Shown {
    const { current, place } = this.tracker;
    if (!place) {
      return 'no-place';
    }
    if (!current) {
      return 'no-kernel';
    }
    return current.kernel.handleComms ? current.phase : 'held';
  }

  override dispose(): void {
    this.stopHearing();
    super.dispose();
  }

  private follow(): void {
    const link = this.tracker.current;
    this.link?.changed.disconnect(this.render, this);
    this.link = link;
    link?.changed.connect(this.render, this);
    this.tracker.place?.title.changed.connect(this.render, this); // once a place: a second time connects nothing
    this.said = '';
    let view: KernelView | null = null;
    if (link) {
      view = this.views.get(link) ?? new KernelView(link, this.trans, this.acts);
      this.views.set(link, view);
    }
    if (view !== this.view) {
      this.view?.show(false);
      this.view = view;
      replace(this.body, view?.node);
    }
    view?.show(this.isVisible);
    this.render();
  }

  protected override onAfterShow(): void {
    this.view?.show(true);
  }

  protected override onAfterHide(): void {
    this.view?.show(false);
  }

  protected override onAfterAttach(): void {
    this.view?.show(this.isVisible);
  }

  private choose(words: string): void {
    const clear = h('button', { class: 'bnviz-plain', onclick: () => select([]) }, this.trans.__('clear'));
    replace(this.chosen, words ? h('span', {}, this.trans.__('Selected: %1', words)) : null, words ? clear : null);
    this.chosen.hidden = !words;
  }

  private render(): void {
    const { trans, shown } = this;
    const name = this.tracker.place?.title.label ?? '';
    const texts: Record<Shown, string> = {
      'no-place': trans.__('Open a notebook or a console'),
      'no-kernel': trans.__('%1 has no kernel', name),
      held: trans.__('%1 shares its kernel with what was closed', name),
      unasked: trans.__('%1 has not been asked', name),
      connecting: trans.__('Connecting to %1', name),
      foreign: trans.__('%1 does not run Python', name),
      absent: trans.__('bnviz is not loaded in %1', name),
      other: trans.__('bnviz in %1 does not fit this panel', name),
      live: this.link?.state?.cell ? trans.__('%1 · cell runs', name) : name,
      stale: trans.__('bnviz is no longer loaded in %1', name),
      dead: trans.__('The kernel of %1 is dead', name)
    };
    this.node.dataset.state = shown;
    if (this.status.textContent !== texts[shown]) {
      this.status.textContent = texts[shown];
    }
    this.status.title = texts[shown];
    const advice = this.advice(shown);
    const key = `${shown}|${this.said}|${this.isLoading}`;
    if (key !== this.noted) {
      this.noted = key;
      replace(this.note, ...advice);
      this.note.hidden = !advice.length;
    }
    this.body.hidden = shown !== 'live' && !(this.link?.state && (shown === 'stale' || shown === 'dead'));
  }

  /** What to do, for each way it may not work. */
  private advice(shown: Shown): HTMLElement[] {
    const { trans } = this;
    const words: Partial<Record<Shown, string>> = {
      'no-place': trans.__('A model is watched in the kernel it lives in: open its notebook, and this panel follows.'),
      'no-kernel': trans.__('Choose a kernel in the notebook’s toolbar.'),
      held: trans.__('Its messages went there. Reload this page to go on.'),
      foreign: trans.__('bnviz watches PyTorch models in Python kernels.'),
      unasked: trans.__('Connecting automatically is switched off in the settings.'),
      absent: trans.__('Load it to see the models of this kernel; nothing of your code is run.'),
      other: trans.__(
        'The kernel has bnviz %1, which speaks protocol %2. Install the same version in both: pip install -U bnviz.',
        this.link?.hello?.version ?? '',
        String(this.link?.hello?.protocol ?? '')
      ),
      stale: trans.__('What is shown is from before. Load bnviz again to go on.'),
      dead: trans.__('What is shown is the last that was seen. Restart the kernel to go on.')
    };
    const text = words[shown];
    if (!text) {
      return this.said ? [h('p', { class: 'bnviz-error', role: 'alert' }, this.said)] : [];
    }
    const wait = h(
      'p',
      { class: 'bnviz-muted', role: 'status' },
      trans.__('It is loaded as soon as the kernel is free.')
    );
    const load = h(
      'button',
      { class: 'jp-mod-styled jp-mod-accept bnviz-button', 'data-key': 'load', onclick: () => void this.load() },
      trans.__('Load bnviz')
    );
    const said = this.said ? [h('p', { class: 'bnviz-error', role: 'alert' }, this.said)] : [];
    return [h('p', {}, text), ...(LOADABLE.includes(shown) ? [this.isLoading ? wait : load] : []), ...said];
  }

  private get isLoading(): boolean {
    return this.link !== null && this.loading.has(this.link);
  }

  private readonly loading = new Set<KernelLink>();
  private readonly status = h('span', { class: 'bnviz-Status', role: 'status' });
  private readonly chosen = h('div', { class: 'bnviz-Chosen', role: 'status', hidden: true });
  private readonly note = h('div', { class: 'bnviz-Note' });
  private readonly body = h('div', { class: 'bnviz-Body' });
  private readonly views = new WeakMap<KernelLink, KernelView>();
  private readonly stopHearing: () => void;
  private link: KernelLink | null = null;
  private view: KernelView | null = null;
  private said = '';
  private noted = '';
}
