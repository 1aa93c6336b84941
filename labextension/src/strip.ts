import { TranslationBundle } from '@jupyterlab/translation';

import { h } from './dom';
import { IStrip } from './protocol';

const SVG = 'http://www.w3.org/2000/svg';
const HEIGHT = 36;
const WIDTH = 320;

/** One number a layer as columns from 0, the largest named; drawn again in place while numbers come. */
export class Strip {
  constructor(
    private readonly trans: TranslationBundle,
    private readonly choose: (layer: number) => void
  ) {
    this.svg.setAttribute('viewBox', `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute('preserveAspectRatio', 'none');
    this.svg.setAttribute('role', 'img');
    this.svg.addEventListener('click', event => this.clicked(event));
    this.node.append(this.head, this.svg);
  }

  readonly node = h('div', { class: 'bnviz-Strip' });

  update(strip: IStrip): void {
    const { values, title, unit, stretch } = strip;
    const finite = values.map(value => (value === null || !Number.isFinite(value) ? null : value));
    const top = Math.max(0, ...finite.map(value => value ?? 0)) || 1;
    const at = finite.indexOf(Math.max(...finite.map(value => value ?? -Infinity)));
    const most = this.trans.__('largest %1 at layer %2', written(top, unit), String(Math.max(0, at) * stretch));
    this.stretch = stretch;
    this.head.replaceChildren(h('span', {}, title), h('span', { class: 'bnviz-muted' }, most));
    this.svg.setAttribute('aria-label', `${title}: ${most}`);
    const wide = WIDTH / finite.length;
    while (this.svg.childElementCount > finite.length) {
      this.svg.lastElementChild!.remove();
    }
    finite.forEach((value, i) => {
      const bar = this.svg.children[i] ?? this.svg.appendChild(document.createElementNS(SVG, 'rect'));
      const tall = value === null ? 1 : Math.max(1, (HEIGHT * Math.max(0, value)) / top);
      const gap = wide > 3 ? 1 : 0;
      const place = { x: i * wide, y: HEIGHT - tall, width: wide - gap, height: tall };
      Object.entries(place).forEach(([name, number]) => bar.setAttribute(name, number.toFixed(2)));
      bar.setAttribute('class', value === null ? 'bnviz-none' : 'bnviz-bar');
      const said = value === null ? this.trans.__('not measured') : written(value, unit);
      this.title(bar).textContent = `${this.layers(i)}: ${said}`;
    });
  }

  private title(bar: Element): Element {
    return bar.firstElementChild ?? bar.appendChild(document.createElementNS(SVG, 'title'));
  }

  private layers(i: number): string {
    const first = i * this.stretch;
    return this.stretch === 1
      ? this.trans.__('layer %1', String(first))
      : this.trans.__('layers %1 to %2', String(first), String(first + this.stretch - 1));
  }

  private clicked(event: MouseEvent): void {
    const i = [...this.svg.children].indexOf((event.target as Element).closest('rect') as Element);
    if (i >= 0) {
      this.choose(i * this.stretch);
    }
  }

  private readonly head = h('div', { class: 'bnviz-Strip-head' });
  private readonly svg = document.createElementNS(SVG, 'svg');
  private stretch = 1;
}

/** Three significant digits and the unit. */
export function written(value: number, unit: string): string {
  const size = Math.abs(value);
  const digits = size === 0 ? 0 : Math.max(0, Math.min(4, 2 - Math.floor(Math.log10(size))));
  const number = value.toFixed(digits).replace('-', '−');
  return unit === '1' ? number : `${number} ${unit}`;
}
