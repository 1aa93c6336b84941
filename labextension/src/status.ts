import { TranslationBundle } from '@jupyterlab/translation';
import { ISignal, Signal } from '@lumino/signaling';
import { Widget } from '@lumino/widgets';

import { h, replace } from './dom';
import { KernelLink } from './link';
import { LinkTracker } from './tracker';

/** In the status bar while a model is watched: which, and how far. A click shows the panel. */
export class StatusItem extends Widget {
  constructor(
    private readonly tracker: LinkTracker,
    private readonly trans: TranslationBundle,
    private readonly open: () => void
  ) {
    super();
    this.addClass('bnviz-StatusItem');
    replace(this.node, this.button);
    tracker.changed.connect(this.follow, this);
    this.follow();
  }

  get active(): boolean {
    return this._active;
  }
  get activeChanged(): ISignal<this, void> {
    return this._changed;
  }

  private follow(): void {
    this.link?.changed.disconnect(this.update_, this);
    this.link = this.tracker.current;
    this.link?.changed.connect(this.update_, this);
    this.update_();
  }

  private update_(): void {
    const { phase, state, live } = this.link ?? {};
    const active = phase === 'live' && Boolean(state?.watching);
    if (active) {
      const text = this.trans.__('bnviz: %1', state!.watching!.model);
      this.button.textContent = live ? `${text} · ${live.words}` : text;
    }
    if (active !== this._active) {
      this._active = active;
      this._changed.emit();
    }
  }

  private readonly button = h('button', { class: 'bnviz-plain', onclick: () => this.open() });
  private link: KernelLink | null = null;
  private _active = false;
  private _changed = new Signal<this, void>(this);
}
