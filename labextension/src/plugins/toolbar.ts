import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import {
  ISessionContextDialogs,
  IToolbarWidgetRegistry,
  SessionContextDialogs
} from '@jupyterlab/apputils';
import type { NotebookPanel } from '@jupyterlab/notebook';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { NotebookSandbox } from '../model/notebook';
import { CommandIDs, DOMAIN, ISandboxes } from '../tokens';
import { SandboxItem } from '../widgets/item';

/**
 * The toolbar item of notebooks. Its place is in the settings: `schema/toolbar.json`.
 */
export const toolbar: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:toolbar',
  description: 'Shows in each notebook what its kernel runs on.',
  autoStart: true,
  requires: [ISandboxes, IToolbarWidgetRegistry],
  // Without a translator everything is English; without dialogs of its own the application gets the default ones.
  optional: [ITranslator, ISessionContextDialogs],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    registry: IToolbarWidgetRegistry,
    translator: ITranslator | null,
    dialogs: ISessionContextDialogs | null
  ): void => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    registry.addFactory<NotebookPanel>('Notebook', 'warmcell', panel => {
      return new SandboxItem({
        notebook: NotebookSandbox.of(panel, sandboxes, trans),
        choose: () => {
          void app.commands.execute(CommandIDs.chooseHardware, { path: panel.context.path });
        },
        selectKernel: () => {
          void (
            dialogs ?? new SessionContextDialogs({ translator: translator ?? nullTranslator })
          ).selectKernel(panel.sessionContext);
        }
      });
    });
  }
};
