import { TranslationBundle } from '@jupyterlab/translation';

import { h, replace } from './dom';
import { FindingRow } from './findings';
import { IFinding, IProgress, IReport, IRun } from './protocol';
import { addresses, select } from './selection';

export interface IRunActs {
  /** The report on a run; told how far it is. */
  report(run: string, told: (progress: IProgress) => void): Promise<IReport>;
  /** A diagnostic of a run, or all of it, as a tab. */
  view(run: string, diagnostic: string | undefined, title: string): void;
  export(run: string): void;
}

const FEW = 7;

/** Runs of the kernel; of the chosen one its findings, ranked, and what can be looked at. */
export class RunsSection {
  constructor(
    private readonly trans: TranslationBundle,
    private readonly acts: IRunActs
  ) {
    this.node.setAttribute('aria-label', trans.__('Runs'));
    this.node.append(h('h3', {}, trans.__('Runs')), this.list, this.body);
  }

  readonly node = h('section', { class: 'bnviz-Section' });

  update(runs: IRun[]): void {
    const idOf = (name: string) => this.runs.find(run => run.name === name)?.id;
    const before = idOf(this.chosen);
    const names = runs.map(run => run.name);
    const fresh = names.filter(name => !this.names.includes(name));
    this.names = names;
    if (!names.includes(this.chosen)) {
      this.choose('');
    }
    const draw = JSON.stringify(runs);
    if (draw !== this.drawn) {
      this.drawn = draw;
      this.runs = runs;
      this.render();
    }
    if (fresh.length) {
      this.choose(fresh[fresh.length - 1]);
    } else if (this.chosen && idOf(this.chosen) !== before) {
      this.choose(this.chosen, true); // the name means another run
    }
  }

  private render(): void {
    const { trans } = this;
    if (!this.runs.length) {
      replace(this.list, h('p', { class: 'bnviz-muted' }, trans.__('No run yet. Watch a model, run it, then stop.')));
      return;
    }
    replace(
      this.list,
      ...this.runs.map(run =>
        h(
          'button',
          {
            class: 'bnviz-Row bnviz-Run',
            'data-key': `run-${run.name}`,
            'aria-pressed': run.name === this.chosen,
            title: trans.__('%1 of %2: %3', run.name, run.model, run.records.join(', ')),
            onclick: () => this.choose(run.name === this.chosen ? '' : run.name)
          },
          h('code', {}, run.name),
          h('span', { class: 'bnviz-muted bnviz-grow' }, `${run.model} · ${run.words}`)
        )
      )
    );
  }

  private choose(name: string, anew = false): void {
    if (name !== this.chosen || anew) {
      this.chosen = name;
      this.report = null;
      replace(this.body);
      this.render();
    }
    if (name) {
      void this.load();
    }
  }

  private async load(): Promise<void> {
    const { trans, chosen } = this;
    const turn = ++this.turn;
    const current = () => turn === this.turn && chosen === this.chosen;
    try {
      const report = await this.acts.report(chosen, ({ done, total, what }) => {
        if (current() && total > done) {
          const bar = h('progress', { max: total, value: done, 'aria-label': trans.__('Diagnosing') });
          replace(this.body, h('p', { class: 'bnviz-muted', role: 'status' }, bar, ` ${what}`));
        }
      });
      if (current() && JSON.stringify(report) !== JSON.stringify(this.report)) {
        this.report = report;
        this.all = false;
        this.renderReport(report);
      }
    } catch (error) {
      if (current()) {
        this.report = null;
        replace(this.body, h('p', { class: 'bnviz-error', role: 'alert' }, (error as Error).message));
      }
    }
  }

  private renderReport(report: IReport): void {
    const { trans, chosen } = this;
    const shown = this.all ? report.findings : report.findings.slice(0, FEW);
    const more = report.findings.length - shown.length;
    const title = trans.__('%1: report', chosen);
    replace(
      this.body,
      h(
        'div',
        { class: 'bnviz-Buttons' },
        this.button('open-report', trans.__('Open report'), () => this.acts.view(chosen, undefined, title)),
        this.button('export', trans.__('Export HTML'), () => this.acts.export(chosen))
      ),
      h('h4', {}, trans.__('Findings')),
      shown.length
        ? h('ol', { class: 'bnviz-Findings' }, ...shown.map((one, i) => this.finding(one, i)))
        : h('p', { class: 'bnviz-muted' }, trans.__('Nothing found above the limits.')),
      more
        ? this.button('more', trans.__('Show %1 more', String(more)), () => {
            this.all = true;
            this.renderReport(report);
            this.body.querySelector<HTMLElement>(`[data-key=finding-${FEW}]`)?.focus(); // the button is gone
          })
        : null,
      h('h4', {}, trans.__('Views')),
      h(
        'ul',
        { class: 'bnviz-Views' },
        ...report.views.map(view => h('li', {}, this.view(view.diagnostic, view.title)))
      ),
      ...Object.entries(report.failures).map(([name, why]) => h('p', { class: 'bnviz-muted' }, `${name}: ${why}`))
    );
  }

  private finding(one: IFinding, i: number): HTMLElement {
    const jump = () => {
      this.acts.view(this.chosen, one.diagnostic, titled(one.diagnostic));
      select(addresses(one.where));
    };
    const row = new FindingRow(this.trans, `finding-${i}`, jump);
    row.update(one);
    return row.node;
  }

  private view(diagnostic: string, title: string): HTMLElement {
    return h(
      'button',
      {
        class: 'bnviz-View-link',
        'data-key': `view-${diagnostic}`,
        title,
        onclick: () => this.acts.view(this.chosen, diagnostic, titled(diagnostic))
      },
      h('strong', {}, titled(diagnostic)),
      h('span', { class: 'bnviz-muted' }, title)
    );
  }

  private button(key: string, text: string, act: () => void): HTMLElement {
    return h('button', { class: 'jp-mod-styled jp-mod-reject bnviz-button', 'data-key': key, onclick: act }, text);
  }

  private readonly list = h('div', { class: 'bnviz-RunList' });
  private readonly body = h('div', { class: 'bnviz-Report' });
  private runs: IRun[] = [];
  private names: string[] = [];
  private chosen = '';
  private report: IReport | null = null;
  private drawn = '';
  private turn = 0;
  private all = false;
}

/** "kv_importance" as a title. */
export function titled(name: string): string {
  const words = name.replace(/_/g, ' ').replace(/\bkv\b/, 'KV');
  return words[0].toUpperCase() + words.slice(1);
}
