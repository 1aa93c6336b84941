import { TranslationBundle } from '@jupyterlab/translation';

import { h, replace } from './dom';

export interface IRunOpener {
  /** The notebook or console in view, where its kernel has bnviz; else null. */
  place(): string | null;
  /** Open a saved run there, in the panel; rejects with a sentence. */
  open(path: string): Promise<void>;
  /** The panel says how a kernel comes by bnviz. */
  panel(): void;
}

/** The tab of a saved run's file: where it opens, why it did not, or what to do first. Open, it is in the panel and the tab goes. */
export class RunFile {
  constructor(
    private readonly path: string,
    private readonly trans: TranslationBundle,
    private readonly opener: IRunOpener,
    private readonly opened: () => void
  ) {
    this.update();
  }

  readonly node = h('div', { class: 'bnviz-RunFile' });

  /** Asked for again, it is tried again where there is a kernel by now; not where that said no. */
  async open(again = false): Promise<void> {
    if (this.opening || this.opener.place() === null || (this.said && !again)) {
      return;
    }
    this.opening = true;
    this.said = '';
    this.update();
    try {
      await this.opener.open(this.path);
      this.opened();
    } catch (error) {
      this.said = (error as Error).message;
    }
    this.opening = false;
    this.update();
  }

  update(): void {
    const place = this.opener.place();
    const key = JSON.stringify([place, this.opening, this.said]);
    if (key !== this.drawn) {
      this.drawn = key;
      replace(this.node, h('h2', {}, this.name), ...(this.opening ? this.waits(place) : this.offers(place)));
    }
  }

  private waits(place: string | null): HTMLElement[] {
    const words = this.trans.__('Opening it in the kernel of %1', place ?? '');
    return [h('p', { class: 'bnviz-muted', role: 'status' }, words)];
  }

  private offers(place: string | null): HTMLElement[] {
    const { trans } = this;
    const said = this.said ? [h('p', { class: 'bnviz-error', role: 'alert' }, this.said)] : [];
    const words = place
      ? trans.__('A run that bnviz saved. It opens in the panel.')
      : trans.__(
          'A run that bnviz saved. It opens in the kernel of a notebook, and no notebook in view has bnviz loaded.'
        );
    const todo = place
      ? []
      : [
          h(
            'p',
            {},
            trans.__(
              'Open a notebook here, load bnviz from its panel, and come back. Or run in a notebook beside the file:'
            )
          ),
          h('pre', {}, `import bnviz\nrun = bnviz.open(${JSON.stringify(this.name)})`)
        ];
    const act = place
      ? this.button(trans.__('Open in the kernel of %1', place), () => void this.open(true))
      : this.button(trans.__('Show the panel'), () => this.opener.panel());
    return [...said, h('p', {}, words), ...todo, act];
  }

  private button(text: string, onclick: () => void): HTMLElement {
    return h('button', { class: 'jp-mod-styled jp-mod-accept bnviz-button', 'data-key': 'act', onclick }, text);
  }

  private get name(): string {
    return this.path.slice(this.path.lastIndexOf('/') + 1);
  }

  private opening = false;
  private said = '';
  private drawn = '';
}
