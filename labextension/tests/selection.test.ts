import { TranslationBundle } from '@jupyterlab/translation';

import { Address, addresses, inWords, onSelect, select, selectAgain } from '../src/selection';

const trans = {
  __: (text: string, ...given: string[]) => text.replace(/%(\d)/g, (_, at) => given[Number(at) - 1])
} as unknown as TranslationBundle;
const BUS = Symbol.for('bnviz');
const bus = () => (window as any)[BUS] as EventTarget;
const elsewhere = (chosen: Address[]) =>
  bus().dispatchEvent(new CustomEvent('select', { detail: { chosen, from: 'a page' } }));

describe('addresses of a finding', () => {
  it.each([
    [{ layer: 1 }, [{ layer: 1 }]],
    [
      { layer: [0, 2], path: 'model.layers' },
      [
        { layer: 0, path: 'model.layers' },
        { layer: 2, path: 'model.layers' }
      ]
    ],
    [
      { layer: [0, 1, 2], head: [4, 5] },
      [
        { layer: 0, head: 4 },
        { layer: 1, head: 5 },
        { layer: 2, head: 5 }
      ]
    ],
    [{}, []]
  ])('%j are %j', (where, expected) => {
    expect(addresses(where)).toEqual(expected);
  });
});

describe('a place in words', () => {
  it.each([
    [[], ''],
    [[{ layer: 1, head: 3, path: 'model.layers.1' }], 'layer 1, head 3 · model.layers.1'],
    [[{ layer: 0 }, { layer: 2, kv_head: 1 }], 'layer 2, kv head 1 and 1 more']
  ])('%j is %p', (chosen, words) => {
    expect(inWords(chosen as Address[], trans)).toBe(words);
  });
});

describe('one selection for the window', () => {
  it('is heard from here and elsewhere, and no longer when that is ended', () => {
    const heard: Address[][] = [];
    const end = onSelect(chosen => heard.push(chosen));
    select([{ layer: 1 }]);
    elsewhere([{ layer: 2 }]);
    end();
    elsewhere([{ layer: 3 }]);
    expect(heard).toEqual([[{ layer: 1 }], [{ layer: 2 }]]);
  });

  it('is told again to what comes later', () => {
    const end = onSelect(() => undefined);
    elsewhere([{ layer: 5 }]);
    const told: unknown[] = [];
    bus().addEventListener('select', event => told.push((event as CustomEvent).detail.chosen));
    selectAgain();
    end();
    expect(told).toEqual([[{ layer: 5 }]]);
  });

  it('is that of a page which has a bus of its own', () => {
    const chosen: unknown[] = [];
    (bus() as any).select = (some: unknown) => chosen.push(some);
    select([{ expert: 4 }]);
    delete (bus() as any).select;
    expect(chosen).toEqual([[{ expert: 4 }]]);
  });
});
