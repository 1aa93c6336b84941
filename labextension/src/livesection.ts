import { TranslationBundle } from '@jupyterlab/translation';

import { Curve } from './curve';
import { h, replace } from './dom';
import { ILive } from './protocol';
import { select } from './selection';
import { Strip } from './strip';

/** A capture while it goes on: how far it is, what it keeps, one strip a quantity. Nothing grows with the time it takes. */
export class LiveSection {
  constructor(private readonly trans: TranslationBundle) {
    this.node.append(
      h('h3', {}, trans.__('Live')),
      this.words,
      this.budget,
      this.memory,
      this.values,
      this.strips,
      this.notes
    );
    this.node.setAttribute('aria-label', trans.__('Live'));
    this.bar.setAttribute('aria-label', trans.__('Share of the budget that is kept'));
    this.node.hidden = true;
  }

  readonly node = h('section', { class: 'bnviz-Section bnviz-Live' });

  update(live: ILive | null): void {
    this.node.hidden = live === null;
    if (live === null || live.seconds < this.seconds) {
      this.curves.clear(); // another capture
      replace(this.values);
      this.seconds = 0;
    }
    if (live === null) {
      return;
    }
    this.seconds = live.seconds;
    this.words.textContent = live.words;
    this.bar.value = live.budget.share;
    this.kept.textContent = live.budget.words;
    this.memory.textContent = live.memory?.words ?? '';
    this.memory.hidden = live.memory === null;
    live.values.forEach(({ name, value }) => this.curve(name).add(live.seconds, value));
    const names = live.strips.map(strip => strip.name).join(' ');
    if (names !== this.shown) {
      this.shown = names;
      this.drawn = live.strips.map(() => new Strip(this.trans, layer => select([{ layer }])));
      replace(this.strips, ...this.drawn.map(strip => strip.node));
    }
    live.strips.forEach((strip, i) => this.drawn[i].update(strip));
    const notes = live.notes.join('\n');
    if (notes !== this.noted) {
      this.noted = notes;
      replace(this.notes, ...live.notes.map(note => h('li', {}, note)));
    }
  }

  private curve(name: string): Curve {
    let curve = this.curves.get(name);
    if (!curve) {
      curve = new Curve(this.trans, name);
      this.curves.set(name, curve);
      this.values.append(curve.node);
    }
    return curve;
  }

  private readonly words = h('p', { class: 'bnviz-words' });
  private readonly bar = h('progress', { max: 1, value: 0 });
  private readonly kept = h('span', { class: 'bnviz-muted' });
  private readonly budget = h('p', { class: 'bnviz-Budget' }, this.bar, this.kept);
  private readonly memory = h('p', { class: 'bnviz-muted' });
  private readonly values = h('div');
  private readonly curves = new Map<string, Curve>();
  private seconds = 0;
  private readonly strips = h('div');
  private readonly notes = h('ul', { class: 'bnviz-notes' });
  private drawn: Strip[] = [];
  private shown = '';
  private noted = '';
}
