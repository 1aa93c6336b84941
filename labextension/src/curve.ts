import { TranslationBundle } from '@jupyterlab/translation';

import { h } from './dom';
import { written } from './strip';

const SVG = 'http://www.w3.org/2000/svg';
const WIDTH = 320;
const HEIGHT = 48;
export const MOST = 240; // points; of more, every other one of the older half is dropped

/** A number over the time of a capture, from its least to its largest; holds so many points however long it takes. */
export class Curve {
  constructor(
    private readonly trans: TranslationBundle,
    private readonly name: string
  ) {
    this.svg.setAttribute('viewBox', `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute('preserveAspectRatio', 'none');
    this.svg.setAttribute('role', 'img');
    this.line.setAttribute('class', 'bnviz-curve');
    this.svg.append(this.line);
    this.node.append(this.head, this.svg);
  }

  readonly node = h('div', { class: 'bnviz-Strip' });

  get length(): number {
    return this.points.length;
  }

  add(at: number, value: number): void {
    if (!Number.isFinite(value) || at <= (this.points[this.points.length - 1]?.[0] ?? -1)) {
      return;
    }
    this.points.push([at, value]);
    if (this.points.length > MOST) {
      const half = MOST / 2;
      this.points = this.points.filter((_, i) => i >= half || i % 2 === 0);
    }
    this.draw();
  }

  private draw(): void {
    const values = this.points.map(([, value]) => value);
    const [least, most] = [Math.min(...values), Math.max(...values)];
    const [first, last] = [this.points[0][0], this.points[this.points.length - 1][0]];
    const x = (at: number) => (last > first ? (WIDTH * (at - first)) / (last - first) : 0);
    const y = (value: number) => (most > least ? 2 + ((HEIGHT - 4) * (most - value)) / (most - least) : HEIGHT / 2);
    this.line.setAttribute(
      'points',
      this.points.map(([at, value]) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`).join(' ')
    );
    const now = written(values[values.length - 1], '1');
    const range = this.trans.__('now %1, from %2 to %3', now, written(least, '1'), written(most, '1'));
    this.head.replaceChildren(h('code', {}, this.name), h('span', { class: 'bnviz-muted' }, range));
    this.svg.setAttribute('aria-label', `${this.name}: ${range}`);
  }

  private readonly head = h('div', { class: 'bnviz-Strip-head' });
  private readonly svg = document.createElementNS(SVG, 'svg');
  private readonly line = document.createElementNS(SVG, 'polyline');
  private points: [number, number][] = [];
}
