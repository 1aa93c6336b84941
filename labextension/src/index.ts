import { ILayoutRestorer, JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette, Notification } from '@jupyterlab/apputils';
import { IConsoleTracker } from '@jupyterlab/console';
import { PageConfig } from '@jupyterlab/coreutils';
import { IDefaultFileBrowser } from '@jupyterlab/filebrowser';
import { INotebookTracker } from '@jupyterlab/notebook';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { IStatusBar } from '@jupyterlab/statusbar';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { LabIcon } from '@jupyterlab/ui-components';

import svg from '../style/icons/bnviz.svg';
import { addCommands, CommandIDs, exportRun } from './commands';
import { BnvizPanel } from './panel';
import { IRunOpener } from './runfile';
import { addRunFiles } from './runfiles';
import { Settings } from './settings';
import { StatusItem } from './status';
import { Tabs } from './tabs';
import { LinkTracker, pathOf } from './tracker';

const ID = 'bnviz:plugin';
const CATEGORY = 'bnviz';

export const icon = new LabIcon({ name: 'bnviz:logo', svgstr: svg });

/** Opens saved runs in the kernel in view. */
function openerOf(app: JupyterFrontEnd, tracker: LinkTracker, panel: BnvizPanel): IRunOpener {
  const show = () => app.shell.activateById(panel.id);
  return {
    place: () => (tracker.current?.phase === 'live' ? (tracker.place?.title.label ?? '') : null),
    open: async path => {
      await tracker.current?.ask('open', { path });
      show();
    },
    panel: show
  };
}

function addStatus(statusBar: IStatusBar | null, item: StatusItem): void {
  statusBar?.registerStatusItem(ID, {
    item,
    align: 'left',
    rank: 100,
    isActive: () => item.active,
    activeStateChanged: item.activeChanged
  });
}

const plugin: JupyterFrontEndPlugin<void> = {
  id: ID,
  description: 'A side panel that watches PyTorch models of the kernel in view and shows what holds them back.',
  autoStart: true,
  requires: [INotebookTracker],
  optional: [
    IConsoleTracker,
    ITranslator,
    ICommandPalette,
    ISettingRegistry,
    ILayoutRestorer,
    IStatusBar,
    IDefaultFileBrowser
  ],
  activate: async (
    app: JupyterFrontEnd,
    notebooks: INotebookTracker,
    consoles: IConsoleTracker | null,
    translator: ITranslator | null,
    palette: ICommandPalette | null,
    registry: ISettingRegistry | null,
    restorer: ILayoutRestorer | null,
    statusBar: IStatusBar | null,
    browser: IDefaultFileBrowser | null
  ) => {
    const trans = (translator ?? nullTranslator).load('bnviz');
    const root = PageConfig.getOption('serverRoot');
    const settings = new Settings();
    const tracker = new LinkTracker(app.shell, notebooks, consoles, () => settings.connects, trans);
    const tabs = new Tabs(app, tracker, trans, icon);
    const panel = new BnvizPanel(tracker, trans, icon, {
      view: (link, run, diagnostic, title) => {
        const path = tracker.place ? pathOf(tracker.place) : '';
        tabs.open({ path, run, diagnostic, title }, link);
      },
      export: (link, run) => exportRun(link, run, trans),
      failed: why => void Notification.error(why, { autoClose: 8000 }),
      probes: () => settings.probes
    });
    const pathOfFile = (path: string) => `${root}/${app.serviceManager.contents.localPath(path)}`;
    const selected = () => {
      const item = browser?.selectedItems().next().value;
      return item ? pathOfFile(item.path) : null;
    };
    const opener = openerOf(app, tracker, panel);
    addCommands({ app, panel, tracker, tabs, trans, icon, opener, selected });
    addRunFiles(app, { trans, icon, opener, changed: tracker.told, pathOf: pathOfFile });
    if (restorer) {
      void restorer.restore(tabs.widgets, {
        command: CommandIDs.view,
        args: tab => ({ ...tab.args }),
        name: tab => tab.id
      });
    }
    tracker.changed.connect(() => tabs.offer());
    await settings.read(registry, ID, () => tracker.connect());
    app.shell.add(panel, settings.side, { rank: 700, type: 'bnviz' });
    restorer?.add(panel, panel.id);
    const commands = [CommandIDs.show, CommandIDs.load, CommandIDs.watchNext, CommandIDs.stop];
    commands.forEach(command => palette?.addItem({ command, category: CATEGORY }));
    const show = () => void app.commands.execute(CommandIDs.show);
    addStatus(statusBar, new StatusItem(tracker, trans, show));
    tracker.shown.connect(() => app.shell.activateById(panel.id));
  }
};

export default plugin;
