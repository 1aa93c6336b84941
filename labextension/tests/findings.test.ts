import { FindingRow } from '../src/findings';
import { LiveSection } from '../src/livesection';
import { IFound, ILive, read } from '../src/protocol';
import { onSelect } from '../src/selection';
import { load, trans } from './shared';

const live: ILive = load('live_findings.json');
const found = live.findings!.found;

describe('findings of what there is so far', () => {
  let section: LiveSection;
  const shown = () => section.node.querySelector<HTMLElement>('.bnviz-Found')!;
  const rows = () => [...shown().querySelectorAll<HTMLElement>('.bnviz-Finding')];
  const update = (more: IFound[], of = 'step 12') => section.update({ ...live, findings: { of, found: more } });
  beforeEach(() => {
    section = new LiveSection(trans);
    document.body.replaceChildren(section.node);
    section.update(live);
  });

  it('are marked, in words and with their place', () => {
    expect(shown().hidden).toBe(false);
    expect(shown().querySelector('h4')!.textContent).toBe(`So far, of ${live.findings!.of}`);
    const texts = rows().map(row => [...row.children].filter(one => !(one as HTMLElement).hidden));
    expect(texts.map(some => some.map(one => one.textContent))).toEqual(
      found.map(one => [
        `${{ high: '■', medium: '▲', low: '●', note: '○' }[one.severity]} ${one.severity}`,
        one.sentence,
        one.place
      ])
    );
  });

  it.each([undefined, null])('are not there where the kernel tells %p', none => {
    section.update({ ...live, findings: none });
    expect(shown().hidden).toBe(true);
    expect(rows()).toHaveLength(0);
  });

  it('may be none', () => {
    const nothing = () => [...shown().querySelectorAll('p')].filter(one => !one.hidden).map(one => one.textContent);
    expect(nothing()).toEqual([]);
    update([]);
    expect(nothing()).toEqual(['Nothing found above the limits.']);
  });

  it('keep their elements and the focus while they change', () => {
    const [first, second] = rows();
    second.focus();
    update(found, 'step 13');
    expect(rows().slice(0, 2)).toEqual([first, second]);
    expect(shown().querySelector('h4')!.textContent).toBe('So far, of step 13');
    update([{ ...found[1], sentence: 'Now otherwise.', severity: 'high' }, found[0]]);
    expect(rows()).toEqual([second, first]);
    expect(document.activeElement).toBe(second);
    expect(second.textContent).toContain('■ highNow otherwise.');
    update([found[0]]);
    expect(document.activeElement).toBe(first); // what had it is found no more
  });

  it('choose their place everywhere', () => {
    const heard: unknown[] = [];
    const end = onSelect(chosen => heard.push(chosen));
    update([{ ...found[0], where: { layer: [0, 2] } }]);
    rows()[0].click();
    end();
    expect(heard).toEqual([[{ layer: 0 }, { layer: 2 }]]);
  });

  it('are text, whatever they say', () => {
    const bad = '<img src=x onerror=alert(1)>';
    update([{ ...found[0], sentence: bad, place: bad, diagnostic: bad, where: { path: bad } }], bad);
    expect(section.node.querySelector('img')).toBeNull();
    expect(rows()[0].textContent).toContain(bad);
  });
});

describe('a finding', () => {
  it('of a run says what it saves and what to do', () => {
    const done: IFound[] = [];
    const row = new FindingRow(trans, 'finding-0', one => done.push(one));
    const one = load('reply_report.json').findings[0];
    row.update(one);
    const button = row.node.querySelector('button')!;
    expect(button.title).toBe(one.advice);
    expect(button.textContent).toContain(`${one.place} · ${one.saving}${one.advice}`);
    button.click();
    expect(done).toEqual([one]);
  });
});

describe('a message with findings', () => {
  const fields = Object.keys(found[0]);
  const spoilt: [string, unknown][] = [
    ['of is no text', { of: 12, found }],
    ['nothing is found', { of: 'step 1' }],
    ['it is a list', found],
    ['a severity is none of ours', { of: 'step 1', found: [{ ...found[0], severity: 'dire' }] }],
    ...fields.map((name): [string, unknown] => [
      `${name} is missing`,
      { of: 'step 1', found: [{ ...found[0], [name]: undefined }] }
    ])
  ];

  it.each(spoilt)('is not read where %s', (_, findings) => {
    expect(read({ ...live, findings })).toBeNull();
  });
});
