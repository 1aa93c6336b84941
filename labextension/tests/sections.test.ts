import { Curve, MOST } from '../src/curve';
import { h, replace } from '../src/dom';
import { LiveSection } from '../src/livesection';
import { ILive, IReport, IRun, IState } from '../src/protocol';
import { RunsSection, titled } from '../src/runs';
import { WatchSection } from '../src/watch';
import { load, settled, trans } from './shared';

const idle = (more: Partial<IState> = {}): IState => ({
  ...load('state.json'),
  watching: null,
  next_cell: null,
  ...more
});

describe('what is live', () => {
  it('is hidden until something is, and then the same elements', () => {
    const section = new LiveSection(trans);
    section.update(null);
    expect(section.node.hidden).toBe(true);
    const live: ILive = load('live.json');
    section.update(live);
    const strips = [...section.node.querySelectorAll('svg')];
    section.update({ ...live, words: '9 forwards' });
    expect(section.node.hidden).toBe(false);
    expect(strips).toHaveLength(live.strips.length + live.values.length);
    expect([...section.node.querySelectorAll('svg')]).toEqual(strips);
    expect(section.node.querySelector('.bnviz-words')!.textContent).toBe('9 forwards');
  });
});

describe('a curve', () => {
  const points = (curve: Curve) => curve.node.querySelector('polyline')!.getAttribute('points')!.split(' ');

  it('goes from its least to its largest, over the time there is', () => {
    const curve = new Curve(trans, 'loss');
    [3, 1, 2].forEach((value, i) => curve.add(i, value));
    expect(points(curve)).toEqual(['0.0,2.0', '160.0,46.0', '320.0,24.0']);
    expect(curve.node.querySelector('svg')!.getAttribute('aria-label')).toBe('loss: now 2.00, from 1.00 to 3.00');
  });

  it('holds so many points however long it takes, the newest among them, and takes no time twice', () => {
    const curve = new Curve(trans, 'loss');
    for (let i = 0; i < 10 * MOST; i++) {
      curve.add(i, i);
      curve.add(i, -1);
      curve.add(i + 0.5, NaN);
      expect(curve.length).toBeLessThanOrEqual(MOST);
    }
    expect(points(curve).at(-1)).toBe('320.0,2.0');
    expect(points(curve)[0]).toBe('0.0,46.0');
  });

  it('begins anew with another capture', () => {
    const section = new LiveSection(trans);
    const live: ILive = load('live.json');
    section.update({ ...live, seconds: 9 });
    section.update({ ...live, seconds: 1, values: [{ name: 'loss', value: 5 }] });
    expect(section.node.querySelector('polyline')!.getAttribute('points')).toBe('0.0,24.0');
  });
});

describe('watching', () => {
  const asked: unknown[] = [];
  const note = async (...given: unknown[]) => asked.push(given) === 0; // not met: nothing comes of it
  const acts = {
    watch: (...given: unknown[]) => note('watch', ...given),
    watchNext: (...given: unknown[]) => note('next', ...given),
    stop: () => note('stop')
  };
  const click = (section: WatchSection, key: string) =>
    section.node.querySelector<HTMLElement>(`[data-key="${key}"]`)!.click();
  beforeEach(() => asked.splice(0));

  it('asks for the usual probes unless others are chosen', async () => {
    const section = new WatchSection(trans, acts, () => []);
    const state = idle();
    document.body.append(section.node); // a box that is nowhere does not change
    section.update(state);
    click(section, 'watch');
    await settled();
    const usual = state.probes.filter(probe => probe.default).map(probe => probe.name);
    click(section, `probe-${usual[0]}`);
    click(section, 'watch-next');
    await settled();
    click(section, `probe-${usual[0]}`);
    click(section, 'watch');
    const model = state.models[0].name;
    expect(asked).toEqual([
      ['watch', model, undefined],
      ['next', model, usual.slice(1)],
      ['watch', model, undefined]
    ]);
    section.node.remove();
  });

  it('asks for what the settings prefer, of what there is', () => {
    const section = new WatchSection(trans, acts, () => ['attention', 'unheard of']);
    section.update(idle());
    click(section, 'watch');
    expect(asked[0]).toEqual(['watch', idle().models[0].name, ['attention']]);
  });

  it('says what is on and offers to stop it', () => {
    const section = new WatchSection(trans, acts, () => []);
    const model = idle().models[0].name;
    section.update(idle({ watching: { model, probes: null, waiting: true, ending: false, gone: false } }));
    expect(section.node.querySelector('.bnviz-badge')!.textContent).toBe('from its next forward');
    click(section, 'stop');
    expect(asked).toEqual([['stop']]);
    section.update(idle({ next_cell: model }));
    expect(section.node.textContent).toContain(`${model} is watched while the next cell runs.`);
  });

  const watching = { model: idle().models[0].name, probes: null, waiting: false, ending: false, gone: false };

  it.each([
    ['watch', idle(), idle({ watching }), 'stop'],
    ['watch-next', idle(), idle({ next_cell: watching.model }), 'stop'],
    ['stop', idle({ watching }), idle(), 'watch']
  ])('%s is asked for once, however fast it is clicked', async (key, before, after, then) => {
    let met: (met: boolean) => void = () => undefined;
    const slow = (...given: unknown[]) => (asked.push(given), new Promise<boolean>(resolve => (met = resolve)));
    const section = new WatchSection(trans, { watch: slow, watchNext: slow, stop: slow }, () => []);
    const off = (one: string) =>
      section.node.querySelector(`[data-key="${one}"]`)!.getAttribute('aria-disabled') === 'true';
    section.update(before);
    click(section, key);
    click(section, key);
    section.next();
    expect(off(key)).toBe(true);
    met(true);
    await settled();
    click(section, key); // met, but not yet told of
    section.update({ ...before, cell: 7 });
    click(section, key);
    expect(asked).toHaveLength(1);
    section.update(after);
    expect(off(then)).toBe(false);
    const second = new MouseEvent('click', { detail: 2, bubbles: true });
    section.node.querySelector(`[data-key="${then}"]`)!.dispatchEvent(second); // of a double click, on what is there now
    expect(asked).toHaveLength(1);
    click(section, then);
    expect(asked).toHaveLength(2);
  });

  it('may be asked for again where it was refused, or nothing came of it', async () => {
    jest.useFakeTimers();
    let met = false;
    const answer = async () => (asked.push('watch'), met);
    const section = new WatchSection(trans, { watch: answer, watchNext: answer, stop: answer }, () => []);
    section.update(idle());
    for (met of [false, true, true]) {
      click(section, 'watch');
      await jest.advanceTimersByTimeAsync(met ? 2000 : 0);
    }
    expect(asked).toHaveLength(3);
    jest.useRealTimers();
  });

  it('says what to do where there is no model', () => {
    const section = new WatchSection(trans, acts, () => []);
    section.update(idle({ models: [] }));
    expect(section.node.textContent).toContain('No model yet');
    expect(section.node.querySelector('button')).toBeNull();
  });

  it('does not say of another model that it is watched', () => {
    const section = new WatchSection(trans, acts, () => []);
    const model = idle().models[0].name;
    section.update(idle({ watching: { model, probes: null, waiting: false, ending: false, gone: true } }));
    expect(section.node.querySelector('.bnviz-badge')).toBeNull();
    expect(section.node.textContent).toContain(`Watched is the model that ${model} was before.`);
  });

  it('says what went wrong where no model is left', () => {
    const section = new WatchSection(trans, acts, () => []);
    section.update(idle({ models: [], said: 'Unknown model.' }));
    expect(section.node.querySelector('[role=alert]')!.textContent).toBe('Unknown model.');
  });

  it('takes the usual probes where the settings prefer others', () => {
    const section = new WatchSection(trans, acts, () => ['attention']);
    document.body.append(section.node);
    const state = idle();
    const usual = state.probes.filter(probe => probe.default).map(probe => probe.name);
    section.update(state);
    usual.filter(name => name !== 'attention').forEach(name => click(section, `probe-${name}`));
    click(section, 'watch');
    expect((asked[0] as unknown[])[2]).toEqual(['...']);
    section.node.remove();
  });

  it('lists what is on request after the usual probes, and asks for it beside them', () => {
    const section = new WatchSection(trans, acts, () => []);
    document.body.append(section.node);
    const state = idle();
    const [asking] = state.probes.filter(probe => !probe.default).map(probe => probe.name);
    const usual = state.probes.filter(probe => probe.default).map(probe => probe.name);
    section.update(state);
    const listed = [...section.node.querySelectorAll('details h4, details code')].map(node => node.textContent);
    expect(listed.slice(0, usual.length + 2)).toEqual([...usual, 'On request', asking]);
    click(section, `probe-${asking}`);
    click(section, 'watch');
    expect((asked[0] as unknown[])[2]).toEqual(['...', asking]);
    section.node.remove();
  });

  it('watches the next cell for a command, with what is chosen, where one model is meant', () => {
    const section = new WatchSection(trans, acts, () => ['attention']);
    section.next();
    section.update(idle());
    section.next();
    section.update(idle({ models: idle().models.slice(0, 1) }));
    section.next();
    expect(asked).toEqual([['next', idle().models[0].name, ['attention']]]);
  });

  it('gives Stop the focus that Watch had, and Watch that of Stop', () => {
    const section = new WatchSection(trans, acts, () => []);
    document.body.append(section.node);
    const key = () => (document.activeElement as HTMLElement).dataset.key;
    const watching = { model: idle().models[0].name, probes: null, waiting: false, ending: false, gone: false };
    section.update(idle());
    section.node.querySelector<HTMLElement>('[data-key=watch]')!.focus();
    section.update(idle({ watching }));
    expect(key()).toBe('stop');
    section.update(idle({ watching: { ...watching, ending: true } }));
    expect(key()).toBe('stop');
    click(section, 'stop'); // it is ending already
    expect(asked).toEqual([]);
    section.update(idle());
    expect(key()).toBe('watch');
    section.node.remove();
  });

  it('keeps the focus where it was', () => {
    const section = new WatchSection(trans, acts, () => []);
    document.body.append(section.node);
    section.update(idle());
    section.node.querySelector<HTMLElement>('[data-key=watch-next]')!.focus();
    section.update(idle({ cell: 3 }));
    expect((document.activeElement as HTMLElement).dataset.key).toBe('watch-next');
    section.node.remove();
  });
});

describe('runs', () => {
  const run = (name: string, id = name): IRun => ({
    name,
    id,
    model: 'net',
    words: '1 forward',
    records: ['attention']
  });
  const report: IReport = load('reply_report.json');

  it('choose the newest, show its findings and open what is asked for', async () => {
    const opened: unknown[] = [];
    const section = new RunsSection(trans, {
      report: async () => report,
      view: (...given) => opened.push(given),
      export: name => opened.push(['export', name])
    });
    section.update([run('run')]);
    section.update([run('run'), run('run_2')]);
    await settled();
    const pressed = [...section.node.querySelectorAll('.bnviz-Run')].map(row => row.getAttribute('aria-pressed'));
    expect(pressed).toEqual(['false', 'true']);
    section.node.querySelector<HTMLElement>('[data-key=finding-0]')!.click();
    section.node.querySelector<HTMLElement>('[data-key=export]')!.click();
    const of = report.findings[0].diagnostic;
    expect(opened).toEqual([
      ['run_2', of, titled(of)],
      ['export', 'run_2']
    ]);
  });

  it('show the report of another run under the same name, though it looks the same', async () => {
    let asked = 0;
    const section = new RunsSection(trans, {
      report: async () => ({ ...report, findings: report.findings.slice(0, ++asked) }),
      view: () => undefined,
      export: () => undefined
    });
    section.update([run('run')]);
    await settled();
    section.update([run('run')]);
    await settled();
    expect(section.node.querySelectorAll('.bnviz-Finding')).toHaveLength(1);
    section.update([run('run', 'another')]);
    await settled();
    expect(asked).toBe(2);
  });

  it('say why there is no report', async () => {
    const section = new RunsSection(trans, {
      report: () => Promise.reject(new Error('This run is empty.')),
      view: () => undefined,
      export: () => undefined
    });
    section.update([run('run')]);
    await settled();
    expect(section.node.querySelector('[role=alert]')!.textContent).toBe('This run is empty.');
  });

  it('forget a report that comes after another run was chosen', async () => {
    let late: (report: IReport) => void = () => undefined;
    const section = new RunsSection(trans, {
      report: name =>
        name === 'run' ? new Promise(resolve => (late = resolve)) : Promise.resolve({ ...report, findings: [] }),
      view: () => undefined,
      export: () => undefined
    });
    section.update([run('run')]);
    section.update([run('run'), run('run_2')]);
    await settled();
    late(report);
    await settled();
    expect(section.node.textContent).toContain('Nothing found above the limits.');
  });

  it.each([
    ['kv_importance', 'KV importance'],
    ['roofline', 'Roofline']
  ])('%s is titled %s', (name, title) => {
    expect(titled(name)).toBe(title);
  });
});

describe('elements', () => {
  it('take text as text', () => {
    const bad = '<img src=x onerror=alert(1)>';
    const made = h('p', { title: bad }, bad);
    replace(made, bad);
    expect(made.querySelector('img')).toBeNull();
    expect(made.textContent).toBe(bad);
  });
});
