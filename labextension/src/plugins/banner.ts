import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import type { NotebookPanel } from '@jupyterlab/notebook';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { DisposableDelegate, type IDisposable } from '@lumino/disposable';

import { NotebookSandbox } from '../model/notebook';
import { CommandIDs, DOMAIN, ISandboxes } from '../tokens';
import { SandboxBanner } from '../widgets/banner';

/**
 * Explanations between a notebook's toolbar and its cells: slow starts, failures and their cures.
 */
export const banner: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:banner',
  description: 'Explains in each notebook why its kernel is slow to start or does not.',
  autoStart: true,
  requires: [ISandboxes],
  optional: [ITranslator],
  activate: (app: JupyterFrontEnd, sandboxes: ISandboxes, translator: ITranslator | null): void => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const dismissed = new Set<string>();
    app.docRegistry.addWidgetExtension('Notebook', {
      createNew: (panel: NotebookPanel): IDisposable => {
        const widget = new SandboxBanner({
          notebook: NotebookSandbox.of(panel, sandboxes, trans),
          choose: () => {
            void app.commands.execute(CommandIDs.chooseHardware, { path: panel.context.path });
          },
          leave: () => {
            panel.content.activate();
          },
          dismissed
        });
        panel.contentHeader.addWidget(widget);
        return new DisposableDelegate(() => {
          widget.dispose();
        });
      }
    });
  }
};
