import { JupyterFrontEnd } from '@jupyterlab/application';
import { InputDialog, Notification } from '@jupyterlab/apputils';
import { TranslationBundle } from '@jupyterlab/translation';
import { LabIcon } from '@jupyterlab/ui-components';

import { KernelLink } from './link';
import { BnvizPanel } from './panel';
import { IRunOpener } from './runfile';
import { Tabs } from './tabs';
import { LinkTracker } from './tracker';
import { IViewArgs } from './view';

export namespace CommandIDs {
  export const show = 'bnviz:show-panel';
  export const load = 'bnviz:load';
  export const watchNext = 'bnviz:watch-next-cell';
  export const stop = 'bnviz:stop';
  export const view = 'bnviz:open-view';
  export const open = 'bnviz:open-run';
}

const NONE = { type: 'object', properties: {} };

export interface ICommanded {
  app: JupyterFrontEnd;
  panel: BnvizPanel;
  tracker: LinkTracker;
  tabs: Tabs;
  trans: TranslationBundle;
  icon: LabIcon;
  opener: IRunOpener;
  /** The path of what is selected in the file browser. */
  selected: () => string | null;
}

/** All commands of the palette, the toolbar and the menus. */
export function addCommands({ app, panel, tracker, tabs, trans, icon, opener, selected }: ICommanded): void {
  const { commands } = app;
  const live = () => tracker.current?.phase === 'live';
  const tell = (error: Error) => void Notification.error(error.message, { autoClose: 8000 });
  const watching = () => Boolean(tracker.current?.state?.watching || tracker.current?.state?.next_cell);
  commands.addCommand(CommandIDs.show, {
    label: trans.__('Show bnviz Panel'),
    caption: trans.__('Show what holds the model in this notebook back'),
    icon,
    describedBy: { args: NONE },
    execute: () => app.shell.activateById(panel.id)
  });
  commands.addCommand(CommandIDs.load, {
    label: trans.__('Load bnviz in This Kernel'),
    caption: trans.__('Run %load_ext bnviz'),
    isEnabled: () => panel.loadable,
    describedBy: { args: NONE },
    execute: () => panel.load()
  });
  commands.addCommand(CommandIDs.watchNext, {
    label: args => (args.toolbar ? '' : trans.__('Watch the Model in the Next Cell')),
    caption: trans.__('bnviz: watch the model while the next cell runs'),
    icon: args => (args.toolbar ? icon : undefined),
    isEnabled: () => tracker.current !== null,
    describedBy: { args: { type: 'object', properties: { toolbar: { type: 'boolean' } } } },
    execute: () => {
      app.shell.activateById(panel.id);
      panel.watchNext();
    }
  });
  commands.addCommand(CommandIDs.stop, {
    label: trans.__('Stop Watching'),
    caption: trans.__('Close the run of the model that is watched'),
    isEnabled: () => live() && watching(),
    describedBy: { args: NONE },
    execute: () => tracker.current?.ask('stop', {}).catch(tell)
  });
  commands.addCommand(CommandIDs.view, {
    label: args => (args.title as string) ?? trans.__('Open bnviz View'),
    describedBy: {
      args: {
        type: 'object',
        required: ['path', 'run', 'title'],
        properties: {
          path: { type: 'string' },
          run: { type: 'string' },
          diagnostic: { type: 'string' },
          title: { type: 'string' }
        }
      }
    },
    execute: args => tabs.open(args as unknown as IViewArgs, null)
  });
  commands.addCommand(CommandIDs.open, {
    label: trans.__('Open as bnviz Run'),
    caption: trans.__('Open a saved run in the kernel of the notebook in view'),
    icon,
    isEnabled: live,
    describedBy: { args: { type: 'object', required: ['path'], properties: { path: { type: 'string' } } } },
    execute: async args => {
      const path = (args.path as string | undefined) ?? selected();
      if (path) {
        await opener.open(path).catch(tell);
      }
    }
  });
  const refresh = () => commands.notifyCommandChanged();
  tracker.changed.connect(refresh);
}

/** Ask for a file, and have the kernel write the report there. */
export async function exportRun(link: KernelLink, run: string, trans: TranslationBundle): Promise<void> {
  const asked = await InputDialog.getText({
    title: trans.__('Export the report of %1', run),
    label: trans.__('File, from the folder of the notebook'),
    text: `${run}.html`,
    okLabel: trans.__('Export')
  });
  if (asked.button.accept && asked.value) {
    const { reply } = await link.ask('export', { run, path: asked.value });
    Notification.success(trans.__('%1 written, %2', String(reply.path), String(reply.size)), { autoClose: 8000 });
  }
}
