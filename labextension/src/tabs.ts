import { JupyterFrontEnd } from '@jupyterlab/application';
import { WidgetTracker } from '@jupyterlab/apputils';
import { TranslationBundle } from '@jupyterlab/translation';
import { LabIcon } from '@jupyterlab/ui-components';
import { TabPanel } from '@lumino/widgets';

import { KernelLink } from './link';
import { LinkTracker, pathOf, Place } from './tracker';
import { IViewArgs, ViewTab } from './view';

/** Tabs with pages, restored after a reload. */
export class Tabs {
  constructor(
    private readonly app: JupyterFrontEnd,
    private readonly tracker: LinkTracker,
    private readonly trans: TranslationBundle,
    private readonly icon: LabIcon
  ) {}

  readonly widgets = new WidgetTracker<ViewTab>({ namespace: 'bnviz-views' });

  open(args: IViewArgs, link: KernelLink | null): void {
    const id = ViewTab.idOf(args);
    const found = this.widgets.find(tab => tab.id === id);
    const tab = found ?? new ViewTab(args, this.trans, this.icon);
    if (!found) {
      void this.widgets.add(tab);
      const other = this.widgets.find(one => one !== tab && one.isAttached && one.args.path === args.path)?.id;
      const ref = other ?? this.tracker.at(args.path)?.id;
      this.app.shell.add(tab, 'main', { mode: other ? 'tab-after' : 'split-right', ref, activate: false });
      if (!tab.isAttached) {
        tab.addClass('bnviz-below'); // Notebook 7 has one document in its main area
        this.app.shell.add(tab, 'down');
      }
    }
    link ??= this.tracker.linkOf(this.tracker.at(args.path)?.sessionContext.session?.kernel);
    if (link) {
      tab.from(link, true);
    }
    this.follow(this.tracker.at(args.path));
    this.app.shell.activateById(tab.id);
    const below = tab.parent?.parent;
    if (below instanceof TabPanel) {
      below.currentWidget = tab; // which Notebook 7 leaves behind the others
    }
  }

  /** A notebook that is renamed keeps its tabs. */
  private follow(place: Place | null): void {
    if (!place || this.followed.has(place)) {
      return;
    }
    this.followed.add(place);
    let path = pathOf(place);
    place.sessionContext.propertyChanged.connect((context, property) => {
      if (property === 'path' && context.path !== path) {
        this.widgets.filter(tab => tab.args.path === path).forEach(tab => this.rename(tab, context.path));
        path = context.path;
      }
    });
  }

  private rename(tab: ViewTab, path: string): void {
    tab.args = { ...tab.args, path };
    tab.id = ViewTab.idOf(tab.args);
    void this.widgets.save(tab);
  }

  /** Tabs that wait for a kernel get it when their notebook has one. */
  offer(): void {
    const { current, place } = this.tracker;
    if (current && place) {
      this.follow(place);
      this.widgets.forEach(tab => tab.args.path === pathOf(place) && tab.from(current));
    }
  }

  private readonly followed = new WeakSet<Place>();
}
