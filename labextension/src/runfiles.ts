import { JupyterFrontEnd } from '@jupyterlab/application';
import { ABCWidgetFactory, DocumentRegistry, DocumentWidget, TextModelFactory } from '@jupyterlab/docregistry';
import { Contents, ContentsManager, IContentProvider } from '@jupyterlab/services';
import { TranslationBundle } from '@jupyterlab/translation';
import { LabIcon } from '@jupyterlab/ui-components';
import { ISignal } from '@lumino/signaling';
import { Message } from '@lumino/messaging';
import { Widget } from '@lumino/widgets';

import { IRunOpener, RunFile } from './runfile';

const NAME = 'bnviz run';
const MODEL = 'bnviz-run';
const NOT_SAVED = 'A run is not saved from its tab.';

/**
 * Of a run's file a page is told that it is there, and that it is not written from here. Of what may be written JupyterLab would have the
 * server keep a copy, however large.
 */
class RunFacts implements IContentProvider {
  constructor(private readonly contents: Contents.IManager) {}

  async get(path: string): Promise<Contents.IModel> {
    return { ...(await this.contents.get(path, { content: false })), writable: false };
  }

  async save(): Promise<Contents.IModel> {
    throw new Error(NOT_SAVED);
  }
}

/** Nothing of the file is asked for: the kernel reads it. */
class RunModels extends TextModelFactory {
  constructor() {
    super(false);
  }
  override get name(): string {
    return MODEL;
  }
  override get fileFormat(): Contents.FileFormat {
    return null;
  }
  override createNew(options?: DocumentRegistry.IModelOptions<any>): DocumentRegistry.ICodeModel {
    const model = super.createNew(options);
    model.readOnly = true;
    model.toString = () => {
      throw new Error(NOT_SAVED); // it is not here: before JupyterLab 4.4 "save" would write an empty file over it
    };
    return model;
  }
}

class RunContent extends Widget {
  constructor(
    private readonly file: RunFile,
    private readonly changed: ISignal<unknown, void>
  ) {
    super({ node: file.node });
    changed.connect(this.onChanged, this);
  }

  override dispose(): void {
    this.changed.disconnect(this.onChanged, this);
    super.dispose();
  }

  protected override onActivateRequest(_: Message): void {
    void this.file.open();
  }

  private onChanged(): void {
    this.file.update();
  }
}

class RunTabs extends ABCWidgetFactory<DocumentWidget> {
  constructor(private readonly given: IRunFiles) {
    super({
      name: NAME,
      label: given.trans.__('bnviz Run'),
      fileTypes: [MODEL],
      defaultFor: [MODEL],
      modelName: MODEL,
      contentProviderId: MODEL,
      readOnly: true,
      canStartKernel: false
    });
  }

  protected createNewWidget(context: DocumentRegistry.Context): DocumentWidget {
    const { trans, opener, changed, pathOf, icon } = this.given;
    const file = new RunFile(pathOf(context.path), trans, opener, () => tab.close());
    const tab = new DocumentWidget({ context, content: new RunContent(file, changed) });
    tab.toolbar.hide();
    tab.title.icon = icon;
    void context.ready.then(() => file.open()); // where it is not activated, as in Notebook 7
    return tab;
  }
}

export interface IRunFiles {
  trans: TranslationBundle;
  icon: LabIcon;
  opener: IRunOpener;
  /** The opener may answer otherwise than before. */
  changed: ISignal<unknown, void>;
  /** A path of the file browser as a kernel has it. */
  pathOf(path: string): string;
}

/** Names of saved runs in the file browser: folders have the icon, a double click on a file opens it. */
export function addRunFiles(app: JupyterFrontEnd, given: IRunFiles): void {
  const { docRegistry } = app;
  const { contents } = app.serviceManager;
  const { trans, icon } = given;
  docRegistry.addFileType({
    name: MODEL,
    displayName: trans.__('bnviz run'),
    extensions: ['.zarr.zip', '.bnviz.zip'],
    mimeTypes: ['application/zip'],
    contentType: 'file',
    fileFormat: 'base64',
    icon
  });
  docRegistry.addFileType({
    name: `${MODEL}-folder`, // a double click goes into it, as into any folder: JupyterLab asks no file type there
    displayName: trans.__('bnviz run, a folder'),
    extensions: ['.zarr'],
    contentType: 'directory',
    icon
  });
  (contents as Partial<ContentsManager>).defaultDrive?.contentProviderRegistry?.register(MODEL, new RunFacts(contents));
  docRegistry.addModelFactory(new RunModels());
  docRegistry.addWidgetFactory(new RunTabs(given));
}
