import { ILive } from '../src/protocol';
import { LiveSection } from '../src/livesection';
import { onSelect } from '../src/selection';
import { Strip, written } from '../src/strip';
import { load, trans } from './shared';

describe('numbers', () => {
  it.each([
    [21.6321, '1', '21.6'],
    [3.5694, 'nat', '3.57 nat'],
    [0.00123, '1', '0.0012'],
    [1234.5, '1', '1235'],
    [0, '1', '0'],
    [-0.5, '1', '−0.500']
  ])('%d %s is written %s', (value, unit, text) => {
    expect(written(value, unit)).toBe(text);
  });
});

describe('a strip', () => {
  const strip = { name: 'load', title: 'Load', unit: '1', values: [1, null, 4], stretch: 1 };

  it('has a column a layer, as tall as its number', () => {
    const drawn = new Strip(trans, () => undefined);
    drawn.update(strip);
    const bars = [...drawn.node.querySelectorAll('rect')];
    expect(bars.map(bar => bar.getAttribute('height'))).toEqual(['9.00', '1.00', '36.00']);
    expect(bars.map(bar => bar.textContent)).toEqual(['layer 0: 1.00', 'layer 1: not measured', 'layer 2: 4.00']);
    expect(drawn.node.querySelector('[role=slider]')!.getAttribute('aria-label')).toBe('Load: largest 4.00 at layer 2');
  });

  it('is drawn again in place, with fewer columns too', () => {
    const drawn = new Strip(trans, () => undefined);
    drawn.update(strip);
    const first = drawn.node.querySelector('rect');
    drawn.update({ ...strip, values: [2, 2] });
    expect(drawn.node.querySelectorAll('rect')).toHaveLength(2);
    expect(drawn.node.querySelector('rect')).toBe(first);
  });

  it('tells which layer was clicked, where a column is several too', () => {
    const layers: number[] = [];
    const drawn = new Strip(trans, layer => layers.push(layer!));
    drawn.update({ ...strip, stretch: 2 });
    drawn.node.querySelectorAll('rect')[2].dispatchEvent(new MouseEvent('click', { bubbles: true }));
    expect(layers).toEqual([4]);
  });
});

describe('a strip with the focus', () => {
  const strip = { name: 'load', title: 'Load', unit: '1', values: [1, null, 4, 2], stretch: 2 };
  const chosen: (number | null)[] = [];
  let drawn: Strip;
  const slider = () => drawn.node.querySelector<HTMLElement>('[role=slider]')!;
  const told = (name: string) => slider().getAttribute(`aria-${name}`);
  const press = (key: string, more: KeyboardEventInit = {}) => {
    const event = new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true, ...more });
    slider().dispatchEvent(event);
    return event.defaultPrevented;
  };
  beforeEach(() => {
    chosen.splice(0);
    drawn = new Strip(trans, layer => chosen.push(layer));
    document.body.replaceChildren(drawn.node);
    drawn.update(strip);
    slider().focus();
  });

  it('has a place among its layers, that keys move', () => {
    expect([told('valuemin'), told('valuemax'), told('valuenow')]).toEqual(['0', '6', '0']);
    const moves: [string, string][] = [
      ['ArrowLeft', 'layers 0 to 1: 1.00'],
      ['ArrowRight', 'layers 2 to 3: not measured'],
      ['ArrowUp', 'layers 4 to 5: 4.00'],
      ['End', 'layers 6 to 7: 2.00'],
      ['ArrowRight', 'layers 6 to 7: 2.00'],
      ['ArrowDown', 'layers 4 to 5: 4.00'],
      ['Home', 'layers 0 to 1: 1.00'],
      ['PageUp', 'layers 6 to 7: 2.00'],
      ['PageDown', 'layers 0 to 1: 1.00']
    ];
    for (const [key, text] of moves) {
      expect(press(key)).toBe(true);
      expect([key, told('valuetext')]).toEqual([key, text]);
      expect(drawn.node.querySelector('.bnviz-muted')!.textContent).toBe(text);
    }
    expect(chosen).toEqual([]);
  });

  it('chooses its layer with Enter and Space, none with Escape, and leaves other keys', () => {
    press('End');
    expect([press('Enter'), press(' '), press('Escape')]).toEqual([true, true, true]);
    expect([press('Tab'), press('a'), press('ArrowLeft', { ctrlKey: true })]).toEqual([false, false, false]);
    expect(chosen).toEqual([6, 6, null]);
  });

  it('stays where it is while numbers come, and tells no number that nobody asked for', () => {
    press('End');
    drawn.update({ ...strip, values: [1, 1, 1, 9] });
    expect(document.activeElement).toBe(slider());
    expect(told('valuetext')).toBe('layers 6 to 7: 2.00');
    expect(drawn.node.querySelector('.bnviz-muted')!.textContent).toBe('layers 6 to 7: 9.00'); // to be seen
    slider().blur();
    drawn.update({ ...strip, values: [1, 1, 1, 8] });
    expect(told('valuetext')).toBe('layers 6 to 7: 8.00');
    expect(drawn.node.querySelector('.bnviz-muted')!.textContent).toBe('largest 8.00 at layer 6');
  });

  it('has a place there is, of fewer layers too', () => {
    press('End');
    drawn.update({ ...strip, values: [5] });
    press('Enter');
    expect(chosen).toEqual([0]);
  });

  it('keeps the focus when other strips come and go, and chooses for all of the window', () => {
    const heard: unknown[] = [];
    const end = onSelect(places => heard.push(places));
    const live: ILive = load('live.json');
    const section = new LiveSection(trans);
    document.body.replaceChildren(section.node);
    section.update({ ...live, strips: live.strips.slice(1) });
    drawn = { node: section.node.querySelector('.bnviz-Strip:has([data-key=strip-load])') } as unknown as Strip;
    slider().focus();
    press('ArrowRight');
    section.update(live);
    expect((document.activeElement as HTMLElement).dataset.key).toBe('strip-load');
    expect(slider()).toBe(document.activeElement);
    section.update({ ...live, strips: [] }); // no number for a moment
    expect(slider()).toBe(document.activeElement);
    press('Enter');
    press('Escape');
    end();
    expect(heard).toEqual([[{ layer: 1 }], []]);
    section.update({ ...live, strips: [], seconds: 0 }); // of another capture
    expect(section.node.querySelector('[role=slider]')).toBeNull();
  });
});
