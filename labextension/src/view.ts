import { MainAreaWidget } from '@jupyterlab/apputils';
import { TranslationBundle } from '@jupyterlab/translation';
import { LabIcon } from '@jupyterlab/ui-components';
import { Widget } from '@lumino/widgets';

import { h, replace } from './dom';
import { KernelLink } from './link';
import { selectAgain } from './selection';

/** Which page of which run of which notebook. */
export interface IViewArgs {
  path: string;
  run: string;
  diagnostic?: string;
  title: string;
}

/** A page of a report in a frame: in this window's theme, with its selection, whole without the kernel once it is here. */
class ViewContent extends Widget {
  constructor(
    private readonly args: IViewArgs,
    private readonly trans: TranslationBundle
  ) {
    super();
    this.addClass('bnviz-View');
    this.say(trans.__('Waiting for the kernel of %1', args.path));
  }

  get loaded(): boolean {
    return this.node.firstElementChild instanceof HTMLIFrameElement;
  }

  async load(link: KernelLink): Promise<void> {
    const { run, diagnostic, title } = this.args;
    const turn = ++this.turn;
    const current = () => turn === this.turn && !this.isDisposed;
    if (!this.loaded) {
      this.say(this.trans.__('Reading %1', run));
    }
    try {
      const { buffers } = await link.ask('page', { run, diagnostic }, ({ done, total, what }) => {
        if (current() && !this.loaded && total > done) {
          this.say(`${what} (${done + 1} / ${total})`);
        }
      });
      const srcdoc = await inflated(buffers[0]);
      if (current()) {
        replace(this.node, h('iframe', { title, 'data-fixed': true, srcdoc, onload: selectAgain }));
      }
    } catch (error) {
      if (current() && !this.loaded) {
        this.say((error as Error).message);
      }
    }
  }

  private turn = 0;

  private say(words: string): void {
    replace(this.node, h('p', { class: 'bnviz-muted', role: 'status' }, words));
  }
}

/** A tab of the main area with one page. */
export class ViewTab extends MainAreaWidget<Widget> {
  constructor(
    public args: IViewArgs,
    trans: TranslationBundle,
    icon: LabIcon
  ) {
    const content = new ViewContent(args, trans);
    super({ content });
    this.page = content;
    this.id = ViewTab.idOf(args);
    this.title.label = args.title;
    this.title.caption = trans.__('%1 · %2 of %3', args.title, args.run, args.path);
    this.title.icon = icon;
    this.title.closable = true;
  }

  static idOf({ path, run, diagnostic }: IViewArgs): string {
    return `bnviz-view:${path}:${run}:${diagnostic ?? ''}`;
  }

  /** Fill it from a kernel now, or when that is there; `anew`: the run of that name may be another by now. */
  from(link: KernelLink, anew = false): void {
    if (link !== this.link) {
      this.link?.changed.disconnect(this.onChanged, this);
      this.link = link;
      link.changed.connect(this.onChanged, this);
    }
    if (anew && link.phase === 'live') {
      this.session = link.hello?.session;
      void this.page.load(link);
    } else {
      this.onChanged();
    }
  }

  private onChanged(): void {
    if (this.link?.phase === 'live' && this.session !== this.link.hello?.session) {
      this.session = this.link.hello?.session;
      if (!this.page.loaded) {
        void this.page.load(this.link);
      }
    }
  }

  private readonly page: ViewContent;
  private link: KernelLink | null = null;
  private session: string | undefined;
}

async function inflated(packed: ArrayBuffer): Promise<string> {
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
}
