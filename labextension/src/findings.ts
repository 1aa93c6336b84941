import { TranslationBundle } from '@jupyterlab/translation';

import { h, replace } from './dom';
import { IFinding, IFound } from './protocol';

const MARK: Record<IFound['severity'], string> = { high: '■', medium: '▲', low: '●', note: '○' };

/** One finding, a button to its place; drawn again in place. */
export class FindingRow {
  constructor(
    private readonly trans: TranslationBundle,
    key: string,
    private readonly act: (one: IFound) => void
  ) {
    this.button.dataset.key = key;
    this.button.append(this.mark, this.sentence, this.place, this.advice);
    this.node.append(this.button);
  }

  readonly node = h('li');

  update(one: IFound & Partial<IFinding>): void {
    const { place, saving, advice = '' } = one;
    const texts: [HTMLElement, string][] = [
      [this.mark, `${MARK[one.severity]} ${this.severity(one)}`],
      [this.sentence, one.sentence],
      [this.place, [place, saving].filter(Boolean).join(' · ')],
      [this.advice, advice]
    ];
    this.one = one;
    this.button.className = `bnviz-Finding bnviz-${one.severity}`;
    this.button.title = advice;
    texts.forEach(([element, text]) => {
      element.hidden = !text;
      if (element.textContent !== text) {
        element.textContent = text;
      }
    });
  }

  private severity({ severity }: IFound): string {
    const { trans } = this;
    return { high: trans.__('high'), medium: trans.__('medium'), low: trans.__('low'), note: trans.__('note') }[
      severity
    ];
  }

  private readonly mark = h('span', { class: 'bnviz-mark' });
  private readonly sentence = h('span', { class: 'bnviz-sentence' });
  private readonly place = h('span', { class: 'bnviz-muted' });
  private readonly advice = h('span', { class: 'bnviz-advice' });
  private readonly button = h('button', { onclick: () => this.one && this.act(this.one) });
  private one: IFound | null = null;
}

/** Findings that change while they are looked at: what is found again, of the same place, keeps its element and the focus. */
export class FindingList {
  constructor(
    private readonly trans: TranslationBundle,
    private readonly act: (one: IFound) => void
  ) {}

  readonly node = h('ol', { class: 'bnviz-Findings' });

  update(found: IFound[]): void {
    const rows = new Map<string, FindingRow>();
    for (const one of found) {
      const of = `found-${one.diagnostic}-${JSON.stringify(one.where)}`;
      const again = [...rows.keys()].filter(key => key.startsWith(of)).length;
      const key = again ? `${of}-${again}` : of;
      const row = this.rows.get(key) ?? new FindingRow(this.trans, key, this.act);
      row.update(one);
      rows.set(key, row);
    }
    if ([...rows.keys()].join('\n') !== [...this.rows.keys()].join('\n')) {
      const held = this.node.contains(document.activeElement);
      replace(this.node, ...[...rows.values()].map(row => row.node));
      if (held && !this.node.contains(document.activeElement)) {
        this.node.querySelector('button')?.focus(); // what had it is found no more
      }
    }
    this.rows = rows;
  }

  private rows = new Map<string, FindingRow>();
}
