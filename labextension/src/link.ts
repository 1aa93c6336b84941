import { Kernel, KernelMessage } from '@jupyterlab/services';
import { TranslationBundle } from '@jupyterlab/translation';
import { JSONObject, UUID } from '@lumino/coreutils';
import { IDisposable } from '@lumino/disposable';
import { ISignal, Signal } from '@lumino/signaling';

import { Action, IActions, IHello, ILive, IProgress, IReply, IState, read, request, TARGET, VERSION } from './protocol';

/**
 * How a kernel stands to this window.
 *
 * `unasked`: not yet, for the settings say so; `foreign`: it runs another language; `absent`: bnviz is not loaded there; `other`: its
 * bnviz speaks another protocol; `stale`: it was restarted or bnviz unloaded, what is shown is from before.
 */
export type Phase = 'unasked' | 'connecting' | 'foreign' | 'absent' | 'other' | 'live' | 'stale' | 'dead';

type Buffers = (ArrayBuffer | ArrayBufferView)[];

export interface IAnswer {
  reply: IReply;
  buffers: ArrayBuffer[];
}

interface IAsked {
  resolve: (answer: IAnswer) => void;
  reject: (reason: Error) => void;
  told?: (progress: IProgress) => void;
}

const CONTROL_PATIENCE = 5000; // ms; a kernel that does not know a control message never answers it
const WINDOW = UUID.uuid4();

/** The link of this window to one kernel; it lives as long as the connection to it, and outlives a change of notebook. */
export class KernelLink implements IDisposable {
  constructor(
    readonly kernel: Kernel.IKernelConnection,
    private readonly trans: TranslationBundle
  ) {
    kernel.statusChanged.connect(this.onStatus, this);
    kernel.disposed.connect(this.dispose, this);
    if (kernel.handleComms) {
      kernel.registerCommTarget(TARGET, this.onOpenedByKernel);
    }
  }

  get phase(): Phase {
    return this._phase;
  }
  get hello(): IHello | null {
    return this._hello;
  }
  get state(): IState | null {
    return this._state;
  }
  get live(): ILive | null {
    return this._live;
  }
  /** Anything of the above is another. */
  get changed(): ISignal<this, void> {
    return this._changed;
  }
  /** The kernel asks for the panel. */
  get shown(): ISignal<this, void> {
    return this._shown;
  }
  get isDisposed(): boolean {
    return this._disposed;
  }

  /** Ask the kernel for a link: it says hello, or closes the comm where bnviz is not loaded. */
  async open(): Promise<void> {
    if (this.asking || this._disposed || !this.kernel.handleComms) {
      return;
    }
    if (this.kernel.status === 'dead') {
      return this.setPhase('dead');
    }
    const opening = (this.asking = this.opened());
    const comm = await opening.catch(() => null);
    if (comm === null && this.asking === opening) {
      this.asking = null;
      if (this._phase === 'connecting') {
        this.setPhase('absent');
      }
    }
  }

  /**
   * Ask for an action; rejects with a sentence where it is refused or the kernel goes away.
   *
   * It is answered while a cell runs, where the kernel has subshells.
   */
  async ask<A extends Action>(action: A, given: IActions[A], told?: (progress: IProgress) => void): Promise<IAnswer> {
    const comm = await this.asking;
    if (!comm || this._phase !== 'live') {
      throw new Error(this.trans.__('This kernel has no bnviz at the moment.'));
    }
    const number = ++this.numbered;
    return new Promise((resolve, reject) => {
      this.asked.set(number, { resolve, reject, told });
      this.post('comm_msg', { comm_id: comm.commId, data: request(number, action, given) as unknown as JSONObject });
    });
  }

  dispose(): void {
    if (this._disposed) {
      return;
    }
    this._disposed = true;
    if (!this.kernel.isDisposed && this.kernel.handleComms) {
      this.kernel.removeCommTarget(TARGET, this.onOpenedByKernel);
    }
    this.giveUp(this.trans.__('The kernel is gone.'));
    Signal.clearData(this);
  }

  /** The comm of this window's requests, on a subshell of its own. */
  private async opened(): Promise<Kernel.IComm> {
    if (this._phase !== 'live' && this._phase !== 'stale') {
      this.setPhase('connecting');
    }
    const spec = await this.kernel.spec.catch(() => undefined);
    if (spec && spec.language.toLowerCase() !== 'python') {
      this.setPhase('foreign');
      throw new Error('not Python');
    }
    this.shell = await this.subshell();
    const comm = this.kernel.createComm(TARGET);
    this.hear(comm, () => this.drop());
    this.post('comm_open', {
      comm_id: comm.commId,
      target_name: TARGET,
      data: { protocol: VERSION, window: WINDOW }
    });
    return comm;
  }

  /**
   * A message on the subshell of this link. ipykernel answers what comes on a comm in the shell that last wrote to that comm; so
   * requests have a comm that no cell writes to, and a shell that no cell runs in.
   */
  private post(msgType: 'comm_open' | 'comm_msg', content: JSONObject): void {
    const { kernel, shell } = this;
    const message = KernelMessage.createMessage({
      msgType,
      channel: 'shell',
      username: kernel.username,
      session: kernel.clientId,
      subshellId: shell,
      content
    } as any) as unknown as KernelMessage.IShellMessage;
    kernel.sendShellMessage(message, false, true);
  }

  /** A subshell, asked for over the control channel, which a busy kernel answers; a page that is reloaded goes on with its own. */
  private async subshell(): Promise<string | null> {
    const key = `bnviz:subshell:${this.kernel.id}`;
    const had = sessionStorage.getItem(key);
    if (had) {
      const there = await this.control('list_subshell_request', {});
      if ((there?.subshell_id as string[] | undefined)?.includes(had)) {
        return had;
      }
    }
    const take = (made: JSONObject | null) => {
      const id = (made?.subshell_id as string | undefined) ?? null;
      if (id) {
        sessionStorage.setItem(key, id);
      }
      return (this.shell = id);
    };
    return take(await this.control('create_subshell_request', {}, take)); // or later: a kernel may be slow to start
  }

  /** A kernel that bnviz is not in keeps no thread for it. */
  private leaveSubshell(): void {
    if (this.shell) {
      sessionStorage.removeItem(`bnviz:subshell:${this.kernel.id}`);
      void this.control('delete_subshell_request', { subshell_id: this.shell });
      this.shell = null;
    }
  }

  private async control(
    msgType: string,
    content: JSONObject,
    late?: (reply: JSONObject) => void
  ): Promise<JSONObject | null> {
    const { kernel } = this;
    try {
      const message = KernelMessage.createMessage({
        msgType,
        channel: 'control',
        username: kernel.username,
        session: kernel.clientId,
        content
      } as any) as any;
      let timer = 0;
      const over = new Promise<null>(resolve => {
        timer = window.setTimeout(() => resolve(null), CONTROL_PATIENCE);
      });
      const done = kernel.sendControlMessage(message, true).done.then(said => said?.content as unknown as JSONObject);
      const reply = await Promise.race([done, over]);
      window.clearTimeout(timer);
      if (reply === null && late) {
        void done.then(late, () => undefined);
      }
      return reply ?? null;
    } catch {
      return null;
    }
  }

  /** bnviz was loaded in the kernel just now. */
  private readonly onOpenedByKernel = (comm: Kernel.IComm, message: KernelMessage.ICommOpenMsg) => {
    this.listen(comm);
    this.take(message.content.data, message.buffers);
    void this.open();
  };

  private listen(comm: Kernel.IComm): void {
    this.stream = comm;
    this.hear(comm, () => this.stream === comm && this.drop());
  }

  private hear(comm: Kernel.IComm, closed: () => void): void {
    // JupyterLab would choose a shell by its settings; this link chooses its own.
    (comm as { commsOverSubshells?: unknown }).commsOverSubshells = 'disabled';
    comm.onMsg = message => this.take(message.content.data, message.buffers);
    comm.onClose = closed;
  }

  private take(data: unknown, buffers?: Buffers): void {
    const message = read(data);
    switch (message?.kind) {
      case 'hello':
        return this.greeted(message);
      case 'state':
        this._state = message;
        if (!message.watching) {
          this._live = null;
        }
        return this._changed.emit();
      case 'live':
        this._live = message;
        return this._changed.emit();
      case 'progress':
        return this.asked.get(message.request)?.told?.(message);
      case 'reply':
        return this.answered(message, (buffers ?? []).map(whole));
      case 'show':
        return this._shown.emit();
    }
  }

  private greeted(hello: IHello): void {
    if (this._hello?.session !== hello.session) {
      this._state = this._live = null;
    }
    this._hello = hello;
    if (hello.protocol !== VERSION) {
      return this.setPhase('other');
    }
    const id = `${TARGET}-${hello.session}`;
    if (this.stream?.commId !== id) {
      this.listen(this.kernel.createComm(TARGET, id)); // the kernel opened it before this window came
    }
    this.setPhase('live');
  }

  private answered(reply: IReply, buffers: ArrayBuffer[]): void {
    const asked = this.asked.get(reply.request);
    this.asked.delete(reply.request);
    if (reply.ok) {
      asked?.resolve({ reply, buffers });
    } else {
      asked?.reject(new Error(reply.error ?? this.trans.__('The kernel refused.')));
    }
  }

  private drop(): void {
    this.asking = this.stream = null;
    this.giveUp(this.trans.__('bnviz was unloaded in this kernel.'));
    if (this._hello === null) {
      this.leaveSubshell();
    }
    this.setPhase(this._hello === null ? 'absent' : 'stale');
  }

  private giveUp(why: string): void {
    const left = [...this.asked.values()];
    this.asked.clear();
    left.forEach(one => one.reject(new Error(why)));
  }

  private onStatus(_: unknown, status: KernelMessage.Status): void {
    const gone = ['restarting', 'autorestarting', 'terminating', 'dead'];
    if (gone.includes(status)) {
      this.asking = this.stream = null; // JupyterLab drops the comms of such a kernel itself
      this.giveUp(this.trans.__('The kernel was stopped.'));
      const as = ['unasked', 'foreign'].includes(this._phase) ? this._phase : 'absent'; // a new kernel has no bnviz
      this.setPhase(status === 'dead' ? 'dead' : this._hello === null ? as : 'stale');
    }
  }

  private setPhase(phase: Phase): void {
    if (phase !== this._phase) {
      this._phase = phase;
      this._changed.emit();
    }
  }

  private stream: Kernel.IComm | null = null;
  private asking: Promise<Kernel.IComm> | null = null;
  private shell: string | null = null;
  private numbered = 0;
  private asked = new Map<number, IAsked>();
  private _phase: Phase = 'unasked';
  private _hello: IHello | null = null;
  private _state: IState | null = null;
  private _live: ILive | null = null;
  private _disposed = false;
  private _changed = new Signal<this, void>(this);
  private _shown = new Signal<this, void>(this);
}

function whole(view: ArrayBuffer | ArrayBufferView): ArrayBuffer {
  if (view instanceof ArrayBuffer) {
    return view;
  }
  return view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength) as ArrayBuffer;
}
