import { Settings } from '../src/settings';

/** A registry with these settings, that may be set otherwise. */
function registry(values: Record<string, unknown>) {
  let heard: () => void = () => undefined;
  const plugin = {
    get: (name: string) => ({ composite: values[name] }),
    changed: { connect: (hear: () => void) => (heard = hear) }
  };
  const set = (more: Record<string, unknown>) => (Object.assign(values, more), heard());
  return { load: async () => plugin, set };
}

describe('settings', () => {
  it('let kernels be asked from when they are read, and at once when they are switched on', async () => {
    const some = registry({ autoConnect: false, probes: [], side: 'left' });
    const settings = new Settings();
    let asked = 0;
    await settings.read(some as any, 'bnviz:plugin', () => asked++);
    expect([asked, settings.connects, settings.side]).toEqual([0, false, 'left']);
    some.set({ autoConnect: true });
    expect([asked, settings.connects]).toEqual([1, true]);
    some.set({ probes: ['attention'] });
    expect([asked, settings.probes]).toEqual([1, ['attention']]);
    some.set({ autoConnect: false });
    expect([asked, settings.connects]).toEqual([1, false]);
  });

  it.each([
    ['there is no registry', null],
    ['the registry fails', { load: () => Promise.reject(new Error('none')) }]
  ])('are the usual ones where %s', async (_, none) => {
    const settings = new Settings();
    let asked = 0;
    await settings.read(none as any, 'bnviz:plugin', () => asked++);
    expect([asked, settings.connects, settings.probes, settings.side]).toEqual([1, true, [], 'right']);
  });
});
