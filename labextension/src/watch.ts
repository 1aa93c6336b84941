import { TranslationBundle } from '@jupyterlab/translation';

import { h, replace } from './dom';
import { IProbe, IState } from './protocol';

/** What is asked of the kernel; each says whether it was met. */
export interface IWatchActs {
  watch(model: string, probes: string[] | undefined): Promise<boolean>;
  watchNext(model: string, probes: string[] | undefined): Promise<boolean>;
  stop(): Promise<boolean>;
}

const USUAL = '...'; // among names of probes: those that are on by default, where the model has what they look at
const PATIENCE = 2000; // ms from a request that was met to the state that shows it

/** Which model is watched, with which probes: the models that live in the kernel, and what may be done with them. */
export class WatchSection {
  constructor(
    private readonly trans: TranslationBundle,
    private readonly acts: IWatchActs,
    private readonly preferred: () => string[]
  ) {
    this.node.setAttribute('aria-label', trans.__('Models'));
  }

  readonly node = h('section', { class: 'bnviz-Section' });

  update(state: IState): void {
    const { trans } = this;
    const held = this.focused('.bnviz-Buttons');
    if (doing(state) !== doing(this.state)) {
      this.asking = 0;
    }
    this.state = state;
    const names = state.models.map(model => model.name);
    if (!names.includes(this.model)) {
      this.model = names[0] ?? '';
    }
    if (!names.length && !state.watching) {
      replace(
        this.node,
        h('h3', {}, trans.__('Models')),
        h('p', { class: 'bnviz-muted' }, this.none()),
        this.said(state)
      );
      return;
    }
    replace(
      this.node,
      h('h3', {}, trans.__('Models')),
      this.models(state),
      this.buttons(state),
      this.said(state),
      this.probes(state)
    );
    if (held && !this.focused('*')) {
      this.node.querySelector<HTMLElement>('.bnviz-Buttons button')?.focus(); // Stop is where Watch was
    }
  }

  /** Watch the next cell as the button does, where it is plain which model is meant. */
  next(): void {
    const { state } = this;
    if (state?.models.length === 1 && !state.watching && !state.next_cell) {
      this.once(() => this.acts.watchNext(this.model, this.chosen(state)));
    }
  }

  /** One thing at a time: what is asked for while another is under way, as by a second click, is not. */
  private once(act: () => Promise<boolean>): void {
    if (this.asking) {
      return;
    }
    const turn = (this.asking = ++this.turn);
    const over = () => {
      if (turn === this.asking && this.state) {
        this.asking = 0;
        this.update(this.state);
      }
    };
    this.node.querySelectorAll('.bnviz-Buttons button').forEach(button => button.setAttribute('aria-disabled', 'true'));
    void act().then(met => (met ? window.setTimeout(over, PATIENCE) : over()));
  }

  private focused(within: string): boolean {
    const element = this.node.contains(document.activeElement) ? document.activeElement : null;
    return Boolean(element?.closest(within)) && element !== this.node;
  }

  private said({ said }: IState): HTMLElement | null {
    return said ? h('p', { class: 'bnviz-error', role: 'alert' }, said) : null;
  }

  private none(): string {
    return this.trans.__('No model yet: no variable of this kernel is a torch.nn.Module. Run the cell that makes one.');
  }

  private models(state: IState): HTMLElement {
    const rows = state.models.map(model => {
      const watched = state.watching?.model === model.name && !state.watching.gone;
      const input = h('input', {
        type: 'radio',
        name: 'bnviz-model',
        value: model.name,
        'data-key': `model-${model.name}`,
        checked: model.name === this.model,
        disabled: state.watching !== null,
        onchange: () => {
          this.model = model.name;
        }
      });
      return h(
        'label',
        { class: 'bnviz-Row', title: `${model.class}, ${model.parameters}` },
        input,
        h('code', {}, model.name),
        h('span', { class: 'bnviz-muted bnviz-grow' }, `${model.class} · ${model.parameters}`),
        watched ? h('span', { class: 'bnviz-badge' }, this.watchedWord(state)) : null
      );
    });
    return h('div', { role: 'radiogroup', 'aria-label': this.trans.__('Models of this kernel') }, ...rows);
  }

  private watchedWord(state: IState): string {
    const { trans } = this;
    if (state.watching?.ending) {
      return trans.__('stopping');
    }
    return state.watching?.waiting ? trans.__('from its next forward') : trans.__('watched');
  }

  private buttons(state: IState): HTMLElement {
    const { trans } = this;
    const busy = state.watching !== null || state.next_cell !== null;
    const button = (
      key: string,
      text: string,
      title: string,
      off: boolean,
      act: () => Promise<boolean>,
      main = false
    ) =>
      h(
        'button',
        {
          class: `jp-mod-styled ${main ? 'jp-mod-accept' : 'jp-mod-reject'} bnviz-button`,
          'data-key': key,
          title,
          'aria-disabled': off || this.asking > 0, // it keeps the focus
          // of a double click the second is not meant for what is there by then: Stop is where Watch was
          onclick: (event: MouseEvent) => off || event.detail > 1 || this.once(act)
        },
        text
      );
    if (busy) {
      const ending = state.watching?.ending ?? false;
      const what = state.next_cell
        ? trans.__('%1 is watched while the next cell runs.', state.next_cell)
        : ending
          ? trans.__('The run is closed when the cell has ended.')
          : state.watching?.gone
            ? trans.__('Watched is the model that %1 was before.', state.watching.model)
            : '';
      return h(
        'div',
        { class: 'bnviz-Buttons' },
        button('stop', trans.__('Stop'), trans.__('Watch no further'), ending, () => this.acts.stop(), true),
        what ? h('span', { class: 'bnviz-muted' }, what) : null
      );
    }
    return h(
      'div',
      { class: 'bnviz-Buttons' },
      button(
        'watch',
        trans.__('Watch'),
        trans.__('Watch this model from now on'),
        !this.model,
        () => this.acts.watch(this.model, this.chosen(state)),
        true
      ),
      button(
        'watch-next',
        trans.__('Watch next cell'),
        trans.__('Watch this model while the next cell runs'),
        !this.model,
        () => this.acts.watchNext(this.model, this.chosen(state))
      )
    );
  }

  private probes(state: IState): HTMLElement {
    const { trans } = this;
    const chosen = this.set(state);
    const row = (probe: IProbe) =>
      h(
        'label',
        { class: 'bnviz-Row', title: probe.summary },
        h('input', {
          type: 'checkbox',
          'data-key': `probe-${probe.name}`,
          checked: chosen.has(probe.name),
          disabled: state.watching !== null,
          onchange: (event: Event) => this.toggle(state, probe.name, (event.target as HTMLInputElement).checked)
        }),
        h('code', {}, probe.name),
        h('span', { class: 'bnviz-muted bnviz-grow' }, probe.summary)
      );
    const asked = state.probes.filter(probe => !probe.default);
    const rows: HTMLElement[] = state.probes.filter(probe => probe.default).map(row);
    if (asked.length) {
      rows.push(h('h4', {}, trans.__('On request')), ...asked.map(row));
    }
    const details = h(
      'details',
      { open: this.unfolded },
      h(
        'summary',
        { 'data-key': 'probes' },
        trans.__('Probes'),
        h('span', { class: 'bnviz-muted' }, ` ${this.summary(state)}`)
      ),
      ...rows
    );
    details.addEventListener('toggle', () => {
      this.unfolded = details.open;
    });
    return details;
  }

  private summary(state: IState): string {
    return this.own === null && !this.preferred().length
      ? this.trans.__('the usual ones')
      : this.trans.__('%1 chosen', String(this.set(state).size));
  }

  private set(state: IState): Set<string> {
    const known = state.probes.map(probe => probe.name);
    const preferred = this.preferred().filter(name => known.includes(name));
    const usual = state.probes.filter(probe => probe.default).map(probe => probe.name);
    return new Set(this.own ?? (preferred.length ? preferred : usual));
  }

  /** What is asked for; undefined: what the kernel takes by default, for not all of it suits every model. */
  private chosen(state: IState): string[] | undefined {
    if (this.own === null && !this.preferred().length) {
      return undefined;
    }
    const set = this.set(state);
    const usual = state.probes.filter(probe => probe.default).map(probe => probe.name);
    const more = [...set].filter(name => !usual.includes(name));
    return usual.length && usual.every(name => set.has(name)) ? [USUAL, ...more] : [...set];
  }

  private toggle(state: IState, name: string, on: boolean): void {
    const set = this.set(state);
    on ? set.add(name) : set.delete(name);
    const usual = state.probes.filter(probe => probe.default).map(probe => probe.name);
    const same = !this.preferred().length && set.size === usual.length && usual.every(one => set.has(one));
    this.own = same || !set.size ? null : [...set];
    this.update(state);
  }

  private state: IState | null = null;
  private asking = 0;
  private turn = 0;
  private model = '';
  private own: string[] | null = null;
  private unfolded = false;
}

/** What a request changes of a state. */
function doing(state: IState | null): string {
  return JSON.stringify([state?.watching, state?.next_cell]);
}
