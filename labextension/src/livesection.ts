import { TranslationBundle } from '@jupyterlab/translation';

import { Curve } from './curve';
import { h, replace } from './dom';
import { FindingList } from './findings';
import { ILive } from './protocol';
import { addresses, select } from './selection';
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
      this.findings,
      this.notes
    );
    this.found = new FindingList(trans, one => select(addresses(one.where)));
    this.nothing.textContent = trans.__('Nothing found above the limits.');
    this.findings.append(this.nothing, this.found.node);
    this.node.setAttribute('aria-label', trans.__('Live'));
    this.bar.setAttribute('aria-label', trans.__('Share of the budget that is kept'));
    this.node.hidden = true;
  }

  readonly node = h('section', { class: 'bnviz-Section bnviz-Live' });

  update(live: ILive | null): void {
    this.node.hidden = live === null;
    this.find(live?.findings ?? null);
    if (live === null || live.seconds < this.seconds) {
      this.curves.clear(); // another capture
      this.drawn.clear();
      [this.values, this.strips].forEach(one => replace(one));
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
    this.draw(live.strips);
    const notes = live.notes.join('\n');
    if (notes !== this.noted) {
      this.noted = notes;
      replace(this.notes, ...live.notes.map(note => h('li', {}, note)));
    }
  }

  private find(findings: ILive['findings'] | null): void {
    const { trans } = this;
    this.findings.hidden = !findings;
    this.found.update(findings?.found ?? []);
    if (findings) {
      const heading = trans.__('So far, of %1', findings.of);
      if (this.of.textContent !== heading) {
        this.of.textContent = heading;
      }
      this.nothing.hidden = findings.found.length > 0;
    }
  }

  /** One that has no number for a moment stays, with the focus it may have, until another capture. */
  private draw(strips: ILive['strips']): void {
    const fresh = strips.some(({ name }) => !this.drawn.has(name));
    strips.forEach(strip => this.strip(strip.name).update(strip));
    if (fresh) {
      const shown = new Set([...strips.map(({ name }) => name), ...this.drawn.keys()]);
      replace(this.strips, ...[...shown].map(name => this.strip(name).node));
    }
  }

  private strip(name: string): Strip {
    let strip = this.drawn.get(name);
    if (!strip) {
      strip = new Strip(this.trans, layer => select(layer === null ? [] : [{ layer }]), name);
      this.drawn.set(name, strip);
    }
    return strip;
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
  private readonly of = h('h4');
  private readonly nothing = h('p', { class: 'bnviz-muted' });
  private readonly found: FindingList;
  private readonly findings = h('div', { class: 'bnviz-Found' }, this.of);
  private readonly notes = h('ul', { class: 'bnviz-notes' });
  private readonly drawn = new Map<string, Strip>();
  private noted = '';
}
