import { TranslationBundle } from '@jupyterlab/translation';

/** One selection for all of a window: cells, tabs and the panel tell each other on one bus, with no kernel. */

export type Address = Record<string, number | string>;

interface IBus extends EventTarget {
  select?: (chosen: Address[], options: { from: unknown }) => void;
}

const BUS = Symbol.for('bnviz');
const US = {};
let current: Address[] = [];

function bus(): IBus {
  const page = window as unknown as Record<symbol, IBus>;
  return (page[BUS] ??= new EventTarget());
}

/** Choose places everywhere. */
export function select(chosen: Address[]): void {
  current = chosen;
  const shared = bus();
  if (shared.select) {
    shared.select(chosen, { from: US });
  } else {
    shared.dispatchEvent(new CustomEvent('select', { detail: { chosen, from: US } }));
  }
}

/** Tell what is chosen again: to a page that has come since. */
export function selectAgain(): void {
  if (current.length) {
    select(current);
  }
}

/** Hear what is chosen, here or elsewhere; returns what stops it. */
export function onSelect(heard: (chosen: Address[]) => void): () => void {
  const listen = (event: Event) => {
    current = (event as CustomEvent).detail.chosen;
    heard(current);
  };
  bus().addEventListener('select', listen);
  return () => bus().removeEventListener('select', listen);
}

/** Coordinates of a finding as addresses: lists are several places. */
export function addresses(where: Record<string, unknown>): Address[] {
  const lists = Object.values(where).filter(Array.isArray) as unknown[][];
  const many = Math.max(1, ...lists.map(list => list.length));
  const at = (value: unknown, i: number) => (Array.isArray(value) ? value[Math.min(i, value.length - 1)] : value);
  return Array.from({ length: many }, (_, i) =>
    Object.fromEntries(Object.entries(where).map(([name, value]) => [name, at(value, i)]))
  ).filter(one => Object.keys(one).length) as Address[];
}

/** A place in words, as figures say it. */
export function inWords(chosen: Address[], trans: TranslationBundle): string {
  const one = chosen[chosen.length - 1];
  if (!one) {
    return '';
  }
  const words: Record<string, (at: string) => string> = {
    layer: at => trans.__('layer %1', at),
    head: at => trans.__('head %1', at),
    kv_head: at => trans.__('kv head %1', at),
    expert: at => trans.__('expert %1', at),
    token: at => trans.__('token %1', at)
  };
  const names = Object.keys(words).filter(name => name in one);
  const place = names.map(name => words[name](String(one[name]))).join(', ');
  const shown = [place, one.path].filter(Boolean).join(' · ');
  return chosen.length > 1 ? trans.__('%1 and %2 more', shown, String(chosen.length - 1)) : shown;
}
