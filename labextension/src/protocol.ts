/**
 * What a kernel and this window say to each other; `bnviz/jupyter/protocol.py` is the other side.
 *
 * Both sides are tested on the same messages, those in `tests/jupyter/messages`.
 */

export const VERSION = 1;
export const TARGET = 'bnviz';

export interface IHello {
  kind: 'hello';
  protocol: number;
  session: string;
  version: string;
}

export interface IModel {
  name: string;
  class: string;
  parameters: string;
}

export interface IRun {
  name: string;
  /** Another one for each run: the next under the same name may look the same. */
  id: string;
  model: string;
  words: string;
  records: string[];
}

export interface IProbe {
  name: string;
  summary: string;
  default: boolean;
}

export interface IWatching {
  model: string;
  probes: string[] | null;
  waiting: boolean;
  ending: boolean;
  /** No variable of that name is that model any more. */
  gone: boolean;
}

export interface IState {
  kind: 'state';
  models: IModel[];
  runs: IRun[];
  probes: IProbe[];
  watching: IWatching | null;
  next_cell: string | null;
  cell: number | null;
  said: string;
}

/** One number for each `stretch` layers; null where there is none. */
export interface IStrip {
  name: string;
  title: string;
  unit: string;
  values: (number | null)[];
  stretch: number;
}

/** What is found, and where. */
export interface IFound {
  severity: 'high' | 'medium' | 'low' | 'note';
  sentence: string;
  place: string;
  where: Record<string, unknown>;
  diagnostic: string;
}

export interface ILive {
  kind: 'live';
  calls: number;
  steps: number;
  seconds: number;
  words: string;
  budget: { share: number; words: string };
  memory: { bytes: number; words: string } | null;
  /** Numbers of the user's that are followed. */
  values: { name: string; value: number }[];
  strips: IStrip[];
  notes: string[];
  /** Of what there is so far, the first of all that is found; null or left out before anything was looked at. */
  findings?: { of: string; found: IFound[] } | null;
}

export interface IFinding extends IFound {
  advice: string;
  saving: string;
}

export interface IReport {
  model: string;
  findings: IFinding[];
  views: { diagnostic: string; title: string }[];
  failures: Record<string, string>;
}

export interface IProgress {
  kind: 'progress';
  request: number;
  done: number;
  total: number;
  what: string;
}

export interface IReply {
  kind: 'reply';
  request: number;
  ok: boolean;
  error?: string;
  [fact: string]: unknown;
}

export interface IShow {
  kind: 'show';
}

export type Message = IHello | IState | ILive | IProgress | IReply | IShow;

/** Actions of a kernel and what each is given. */
export interface IActions {
  watch: { model: string; probes?: string[] };
  watch_next: { model: string; probes?: string[] };
  stop: Record<string, never>;
  report: { run: string };
  page: { run: string; diagnostic?: string };
  export: { run: string; path: string };
  open: { path: string };
}

export type Action = keyof IActions;

export interface IRequest {
  kind: 'request';
  request: number;
  action: Action;
  arguments: Record<string, unknown>;
}

export function request<A extends Action>(number: number, action: A, given: IActions[A]): IRequest {
  return { kind: 'request', request: number, action, arguments: { ...given } };
}

type Check = (value: any) => boolean;
const text: Check = value => typeof value === 'string';
const number: Check = value => typeof value === 'number';
const truth: Check = value => typeof value === 'boolean';
const orNull =
  (check: Check): Check =>
  value =>
    value === null || check(value);
const orLeftOut =
  (check: Check): Check =>
  value =>
    value === undefined || value === null || check(value);
const list =
  (check: Check): Check =>
  value =>
    Array.isArray(value) && value.every(check);
const having =
  (fields: Record<string, Check>): Check =>
  value =>
    typeof value === 'object' &&
    value !== null &&
    Object.entries(fields).every(([name, check]) => check((value as any)[name]));

const severity: Check = value => ['high', 'medium', 'low', 'note'].includes(value);
const found = { severity, sentence: text, place: text, where: having({}), diagnostic: text };

const SHAPES: Record<Message['kind'], Check> = {
  hello: having({ protocol: number, session: text, version: text }),
  state: having({
    models: list(having({ name: text, class: text, parameters: text })),
    runs: list(having({ name: text, id: text, model: text, words: text, records: list(text) })),
    probes: list(having({ name: text, summary: text, default: truth })),
    watching: orNull(having({ model: text, probes: orNull(list(text)), waiting: truth, ending: truth, gone: truth })),
    next_cell: orNull(text),
    cell: orNull(number),
    said: text
  }),
  live: having({
    calls: number,
    steps: number,
    seconds: number,
    words: text,
    budget: having({ share: number, words: text }),
    memory: orNull(having({ bytes: number, words: text })),
    values: list(having({ name: text, value: number })),
    strips: list(having({ name: text, title: text, unit: text, values: list(orNull(number)), stretch: number })),
    notes: list(text),
    findings: orLeftOut(having({ of: text, found: list(having(found)) }))
  }),
  progress: having({ request: number, done: number, total: number, what: text }),
  reply: having({ request: number, ok: truth }),
  show: () => true
};

/** The message that came, or null where it is none that this window knows: a newer kernel may say more. */
export function read(data: unknown): Message | null {
  const kind = (data as { kind?: Message['kind'] } | null)?.kind;
  const known = typeof kind === 'string' && Object.prototype.hasOwnProperty.call(SHAPES, kind);
  return known && SHAPES[kind](data) ? (data as Message) : null;
}

const finding = having({ ...found, advice: text, saving: text });
const report = having({
  model: text,
  findings: list(finding),
  views: list(having({ diagnostic: text, title: text })),
  failures: having({})
});

/** The report that a reply holds. */
export function reportOf(reply: IReply): IReport {
  if (!report(reply)) {
    throw new Error('The kernel sent a report that this panel cannot read.');
  }
  return reply as unknown as IReport;
}
