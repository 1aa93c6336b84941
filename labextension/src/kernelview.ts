import { TranslationBundle } from '@jupyterlab/translation';

import { h } from './dom';
import { KernelLink } from './link';
import { LiveSection } from './livesection';
import { IReport, reportOf } from './protocol';
import { RunsSection } from './runs';
import { WatchSection } from './watch';

export interface IPanelActs {
  view(link: KernelLink, run: string, diagnostic: string | undefined, title: string): void;
  export(link: KernelLink, run: string): Promise<void>;
  failed(why: string): void;
  probes(): string[];
}

/** All that the panel shows of one kernel; it stays while another notebook is in view. */
export class KernelView {
  constructor(
    readonly link: KernelLink,
    trans: TranslationBundle,
    acts: IPanelActs
  ) {
    const tell = (error: Error) => acts.failed(error.message);
    const met = (asked: Promise<unknown>) => asked.then(() => true).catch(error => (tell(error), false));
    this.watch = new WatchSection(
      trans,
      {
        watch: (model, probes) => met(link.ask('watch', { model, probes })),
        watchNext: (model, probes) => met(link.ask('watch_next', { model, probes })),
        stop: () => met(link.ask('stop', {}))
      },
      acts.probes
    );
    this.live = new LiveSection(trans);
    this.runs = new RunsSection(trans, {
      report: async (run, told): Promise<IReport> => reportOf((await link.ask('report', { run }, told)).reply),
      view: (run, diagnostic, title) => acts.view(link, run, diagnostic, title),
      export: run => void acts.export(link, run).catch(tell)
    });
    this.node.append(this.watch.node, this.live.node, this.runs.node);
    link.changed.connect(this.update, this);
    this.update();
  }

  readonly node = h('div', { class: 'bnviz-Kernel' });

  watchNext(): void {
    this.watch.next();
  }

  /** While nobody sees it nothing is drawn and no run is diagnosed: that would take time from the user's cells. */
  show(seen: boolean): void {
    this.visible = seen;
    this.update();
  }

  private update(): void {
    if (!this.visible) {
      return;
    }
    const { state, live, phase } = this.link;
    this.node.classList.toggle('bnviz-past', phase !== 'live');
    this.node.hidden = phase === 'live' && state === null; // what there is belongs to the kernel before
    this.live.update(state?.watching ? live : null);
    if (state && state !== this.seen) {
      this.seen = state;
      this.watch.update(state);
      if (phase === 'live') {
        this.runs.update(state.runs);
      }
    }
  }

  private readonly watch: WatchSection;
  private readonly live: LiveSection;
  private readonly runs: RunsSection;
  private seen: unknown = null;
  private visible = false;
}
