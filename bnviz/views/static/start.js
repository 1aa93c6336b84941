// Whoever comes first makes the bus; a bare EventTarget that is there already is furnished.

const BUS = Symbol.for('bnviz');
if (!globalThis[BUS]?.adopt) {
  const made = (globalThis[BUS] ??= new EventTarget());
  themed(made);
  selecting(made);
}
