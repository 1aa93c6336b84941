import { JupyterFrontEnd } from '@jupyterlab/application';
import { ISessionContext } from '@jupyterlab/apputils';
import { ConsolePanel, IConsoleTracker } from '@jupyterlab/console';
import { INotebookTracker, NotebookPanel } from '@jupyterlab/notebook';
import { Kernel } from '@jupyterlab/services';
import { TranslationBundle } from '@jupyterlab/translation';
import { IDisposable } from '@lumino/disposable';
import { ISignal, Signal } from '@lumino/signaling';

import { KernelLink } from './link';

export type Place = NotebookPanel | ConsolePanel;

/** Follows the notebook or console in view, and hands out the link of its kernel. */
export class LinkTracker implements IDisposable {
  constructor(
    private readonly shell: JupyterFrontEnd.IShell,
    private readonly notebooks: INotebookTracker,
    private readonly consoles: IConsoleTracker | null,
    readonly connects: () => boolean,
    private readonly trans: TranslationBundle
  ) {
    notebooks.currentChanged.connect(this.onPlace, this);
    consoles?.currentChanged.connect(this.onPlace, this);
    shell.currentChanged?.connect(this.onShell, this); // back from the console to the notebook, which was the last of its kind
    this.follow(notebooks.currentWidget ?? consoles?.currentWidget ?? null);
  }

  /** Of the kernel in view; null where there is none. */
  get current(): KernelLink | null {
    return this._current;
  }
  /** The notebook or console in view. */
  get place(): Place | null {
    return this._place;
  }
  get changed(): ISignal<this, void> {
    return this._changed;
  }
  /** Of a kernel something is another, or another one is in view. */
  get told(): ISignal<this, void> {
    return this._told;
  }
  /** A kernel asks for the panel. */
  get shown(): ISignal<this, void> {
    return this._shown;
  }
  get isDisposed(): boolean {
    return this._disposed;
  }

  /** The link of a kernel, made at first: of the notebook and the console on one kernel, only one connection hears comms. */
  linkOf(asked: Kernel.IKernelConnection | null | undefined): KernelLink | null {
    if (!asked || asked.isDisposed) {
      return null;
    }
    const kernels = this.places().map(place => place.sessionContext.session?.kernel);
    const hears = (one: (typeof kernels)[number]) => one?.id === asked.id && !one.isDisposed && one.handleComms;
    const kernel = asked.handleComms ? asked : (kernels.find(hears) ?? asked);
    let link = this.links.get(kernel);
    if (!link) {
      link = new KernelLink(kernel, this.trans);
      this.links.set(kernel, link);
      link.shown.connect(() => this._shown.emit());
      link.changed.connect(() => this._told.emit());
      kernel.disposed.connect(() => {
        this.links.delete(kernel);
        if (this._current === link && !this._disposed) {
          this.onKernel(); // a console whose notebook was closed
        }
      });
    }
    return link;
  }

  /** The notebook or console at a path, open in this window. */
  at(path: string): Place | null {
    return this.places().find(one => pathOf(one) === path) ?? null;
  }

  private places(): Place[] {
    const places: Place[] = [];
    this.notebooks.forEach(one => places.push(one));
    this.consoles?.forEach(one => places.push(one));
    return places;
  }

  dispose(): void {
    this._disposed = true;
    this.notebooks.currentChanged.disconnect(this.onPlace, this);
    this.consoles?.currentChanged.disconnect(this.onPlace, this);
    this.shell.currentChanged?.disconnect(this.onShell, this);
    this.session?.kernelChanged.disconnect(this.onKernel, this);
    this.links.forEach(link => link.dispose());
    Signal.clearData(this);
  }

  /** Ask the kernel in view, where the settings let it be asked. */
  connect(): void {
    if (this._current && this.connects()) {
      void this._current.open();
    }
  }

  private onPlace(_: unknown, place: Place | null): void {
    const shown = this.inView();
    if (shown && shown !== place) {
      return; // the last of its kind is another one, what is in view is not: a notebook was closed beside a console
    }
    this.follow(place ?? this.notebooks.currentWidget ?? this.consoles?.currentWidget ?? null);
  }

  private inView(): Place | undefined {
    return this.places().find(one => one === this.shell.currentWidget);
  }

  private onShell(): void {
    const place = this.inView();
    if (place && place !== this._place) {
      this.follow(place);
    }
  }

  private follow(place: Place | null): void {
    this.session?.kernelChanged.disconnect(this.onKernel, this);
    this._place = place;
    this.session = place?.sessionContext ?? null;
    this.session?.kernelChanged.connect(this.onKernel, this);
    place?.disposed.connect(this.onGone, this);
    this.onKernel();
  }

  private onGone(place: Place): void {
    if (this._place === place) {
      this.follow(null);
    }
  }

  private onKernel(): void {
    this._current = this.linkOf(this.session?.session?.kernel);
    this.connect();
    this._changed.emit();
    this._told.emit();
  }

  private links = new Map<Kernel.IKernelConnection, KernelLink>();
  private session: ISessionContext | null = null;
  private _place: Place | null = null;
  private _current: KernelLink | null = null;
  private _disposed = false;
  private _changed = new Signal<this, void>(this);
  private _told = new Signal<this, void>(this);
  private _shown = new Signal<this, void>(this);
}

export function pathOf(place: Place): string {
  return place.sessionContext.path;
}
