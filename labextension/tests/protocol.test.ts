import { readdirSync, readFileSync } from 'fs';
import { join } from 'path';

import { Action, IReply, read, reportOf, request } from '../src/protocol';

/** The messages that the tests of the kernel's side hold real kernels to. */
const FOLDER = join(__dirname, '..', '..', 'tests', 'jupyter', 'messages');
const load = (name: string) => JSON.parse(readFileSync(join(FOLDER, name), 'utf8'));
const said = readdirSync(FOLDER).filter(name => !name.includes('requests'));

describe('messages of a kernel', () => {
  it('are there', () => {
    expect(said.length).toBeGreaterThan(5);
  });

  it.each(said)('%s is read as it is', name => {
    const message = load(name);
    expect(read(message)).toBe(message);
  });

  it.each(said)('%s is not read when a field has another type', name => {
    const message = load(name);
    const fields = Object.keys(message).filter(field => field !== 'kind');
    const spoilt = fields.map(field => read({ ...message, [field]: Symbol('none of ours') }));
    const known = message.kind === 'reply' ? ['request', 'ok'] : fields;
    fields.forEach((field, i) => known.includes(field) && expect([field, spoilt[i]]).toEqual([field, null]));
  });

  it.each([null, undefined, 3, 'state', {}, { kind: 'toString' }, { kind: '__proto__' }, { kind: 'later' }, []])(
    '%p is none',
    thing => {
      expect(read(thing)).toBeNull();
    }
  );

  it('may say more than this panel knows', () => {
    const message = { ...load('hello.json'), mood: 'good' };
    expect(read(message)).toBe(message);
  });
});

describe('requests', () => {
  const asked = load('requests.json').filter((one: any) => one.arguments && one.arguments.diagnostic !== null);
  it.each(asked as any[])('$action is what the kernel expects', one => {
    expect(request(one.request, one.action as Action, one.arguments)).toEqual(one);
  });
});

describe('a report', () => {
  const name = said.find(one => one.includes('report'))!;

  it('is taken from the reply that holds one', () => {
    const report = reportOf(load(name) as IReply);
    expect(report.findings[0].sentence).not.toBe('');
    expect(report.views.map(view => view.diagnostic)).not.toHaveLength(0);
  });

  it.each(['model', 'findings', 'views', 'failures'])('without %s is refused in a sentence', field => {
    const reply = load(name);
    delete reply[field];
    expect(() => reportOf(reply)).toThrow('The kernel sent a report that this panel cannot read.');
  });
});
