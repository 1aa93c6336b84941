import { TranslationBundle } from '@jupyterlab/translation';

import { h } from './dom';
import { IStrip } from './protocol';

const SVG = 'http://www.w3.org/2000/svg';
const HEIGHT = 36;
const WIDTH = 320;
const PAGE = 10; // columns

/**
 * One number a layer as columns from 0, the largest named; drawn again in place while numbers come.
 *
 * A click chooses a column's layer. With the focus it is a slider over the columns: arrows, Page Up and Down, Home and End move,
 * Enter or Space chooses, Escape chooses none.
 */
export class Strip {
  constructor(
    private readonly trans: TranslationBundle,
    private readonly choose: (layer: number | null) => void,
    name = ''
  ) {
    this.svg.setAttribute('viewBox', `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute('preserveAspectRatio', 'none');
    this.svg.setAttribute('aria-hidden', 'true');
    this.cursor.setAttribute('class', 'bnviz-cursor');
    this.svg.append(this.bars, this.cursor);
    this.plot.dataset.key = `strip-${name}`;
    this.plot.append(this.svg);
    this.svg.addEventListener('click', event => this.clicked(event));
    this.plot.addEventListener('keydown', event => this.pressed(event));
    this.plot.addEventListener('focus', () => this.read());
    this.plot.addEventListener('blur', () => this.read());
    this.node.append(h('div', { class: 'bnviz-Strip-head' }, this.title, this.said), this.plot);
  }

  readonly node = h('div', { class: 'bnviz-Strip' });

  update(strip: IStrip): void {
    const { values, unit, stretch } = strip;
    this.values = values.map(value => (value === null || !Number.isFinite(value) ? null : value));
    this.unit = unit;
    this.stretch = stretch;
    this.at = Math.max(0, Math.min(this.at, values.length - 1));
    const top = Math.max(0, ...this.values.map(value => value ?? 0)) || 1;
    const at = this.values.indexOf(Math.max(...this.values.map(value => value ?? -Infinity)));
    this.most = this.trans.__('largest %1 at layer %2', written(top, unit), String(Math.max(0, at) * stretch));
    this.title.textContent = strip.title;
    this.draw(top);
    this.read();
    if (!this.focused) {
      this.tell(); // with the focus only what a key does is told: not every number that comes
    }
  }

  private draw(top: number): void {
    const wide = WIDTH / this.values.length;
    while (this.bars.childElementCount > this.values.length) {
      this.bars.lastElementChild!.remove();
    }
    this.values.forEach((value, i) => {
      const bar = this.bars.children[i] ?? this.bars.appendChild(document.createElementNS(SVG, 'rect'));
      const tall = value === null ? 1 : Math.max(1, (HEIGHT * Math.max(0, value)) / top);
      const gap = wide > 3 ? 1 : 0;
      const place = { x: i * wide, y: HEIGHT - tall, width: wide - gap, height: tall };
      Object.entries(place).forEach(([name, number]) => bar.setAttribute(name, number.toFixed(2)));
      bar.setAttribute('class', value === null ? 'bnviz-none' : 'bnviz-bar');
      const title = bar.firstElementChild ?? bar.appendChild(document.createElementNS(SVG, 'title'));
      title.textContent = this.column(i);
    });
  }

  /** What is read beside the title: the column of the cursor where that is, else the largest. */
  private read(): void {
    const wide = WIDTH / this.values.length;
    const [from, to] = [this.at * wide, (this.at + 1) * wide].map(x => x.toFixed(2));
    this.cursor.setAttribute('d', `M${from} 0H${to}V${HEIGHT}H${from}Z`);
    this.said.textContent = this.focused ? this.column(this.at) : this.most;
  }

  /** What a screen reader is told. */
  private tell(): void {
    const facts = {
      'aria-label': `${this.title.textContent}: ${this.most}`,
      'aria-valuemin': 0,
      'aria-valuemax': (this.values.length - 1) * this.stretch,
      'aria-valuenow': this.at * this.stretch,
      'aria-valuetext': this.column(this.at)
    };
    Object.entries(facts).forEach(([name, fact]) => this.plot.setAttribute(name, String(fact)));
  }

  private column(i: number): string {
    const value = this.values[i];
    return `${this.layers(i)}: ${value === null ? this.trans.__('not measured') : written(value, this.unit)}`;
  }

  private layers(i: number): string {
    const first = i * this.stretch;
    return this.stretch === 1
      ? this.trans.__('layer %1', String(first))
      : this.trans.__('layers %1 to %2', String(first), String(first + this.stretch - 1));
  }

  private clicked(event: MouseEvent): void {
    const i = [...this.bars.children].indexOf((event.target as Element).closest('rect') as Element);
    if (i >= 0) {
      this.move(i);
      this.choose(i * this.stretch);
    }
  }

  private pressed(event: KeyboardEvent): void {
    if (event.ctrlKey || event.metaKey || event.altKey) {
      return;
    }
    const { at } = this;
    const to: Record<string, number> = {
      ArrowRight: at + 1,
      ArrowUp: at + 1,
      ArrowLeft: at - 1,
      ArrowDown: at - 1,
      PageUp: at + PAGE,
      PageDown: at - PAGE,
      Home: 0,
      End: Infinity
    };
    if (event.key in to) {
      this.move(to[event.key]);
    } else if (event.key === 'Enter' || event.key === ' ') {
      this.choose(at * this.stretch);
    } else if (event.key === 'Escape') {
      this.choose(null);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  private move(at: number): void {
    this.at = Math.max(0, Math.min(at, this.values.length - 1));
    this.read();
    this.tell();
  }

  private get focused(): boolean {
    return this.plot === document.activeElement;
  }

  private readonly title = h('span');
  private readonly said = h('span', { class: 'bnviz-muted' });
  private readonly plot = h('div', { class: 'bnviz-Strip-plot', role: 'slider', tabindex: 0 });
  private readonly svg = document.createElementNS(SVG, 'svg');
  private readonly cursor = document.createElementNS(SVG, 'path');
  private readonly bars = document.createElementNS(SVG, 'g');
  private values: (number | null)[] = [];
  private unit = '1';
  private stretch = 1;
  private most = '';
  private at = 0;
}

/** Three significant digits and the unit. */
export function written(value: number, unit: string): string {
  const size = Math.abs(value);
  const digits = size === 0 ? 0 : Math.max(0, Math.min(4, 2 - Math.floor(Math.log10(size))));
  const number = value.toFixed(digits).replace('-', '−');
  return unit === '1' ? number : `${number} ${unit}`;
}
