import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { PathExt } from '@jupyterlab/coreutils';
import { INotebookTracker, type NotebookPanel } from '@jupyterlab/notebook';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import type { ReadonlyPartialJSONObject } from '@lumino/coreutils';

import { NotebookSandbox } from '../model/notebook';
import { CommandIDs, DOMAIN, ISandboxes } from '../tokens';
import { applyChoice, changeGpu } from '../widgets/apply';
import { sandboxIcon } from '../widgets/icons';
import { pick } from '../widgets/picker';

/**
 * The command that lets the user choose what a notebook's sandbox gets. Its menu entry is in `schema/picker.json`.
 */
export const picker: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:picker',
  description: 'Chooses GPU, memory, network and template of a notebook.',
  autoStart: true,
  requires: [ISandboxes, INotebookTracker],
  optional: [ITranslator, ICommandPalette],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    tracker: INotebookTracker,
    translator: ITranslator | null,
    palette: ICommandPalette | null
  ): void => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);

    const panelOf = (args: ReadonlyPartialJSONObject): NotebookPanel | null =>
      tracker.find(panel => panel.context.path === args.path) ?? tracker.currentWidget;

    const isOurs = (args: ReadonlyPartialJSONObject): boolean => {
      const panel = panelOf(args);
      return panel !== null && NotebookSandbox.of(panel, sandboxes, trans).situation.ours;
    };

    app.commands.addCommand(CommandIDs.chooseHardware, {
      label: trans.__('Choose GPU, Memory and Network…'),
      caption: trans.__('Choose what the sandbox of this notebook gets'),
      icon: sandboxIcon,
      isEnabled: isOurs,
      describedBy: {
        args: {
          type: 'object',
          properties: {
            path: {
              type: 'string',
              description: trans.__('The notebook; the current one if absent')
            }
          }
        }
      },
      execute: async args => {
        const panel = panelOf(args);
        if (panel !== null) {
          await choose(panel);
        }
      }
    });
    palette?.addItem({
      command: CommandIDs.chooseHardware,
      category: trans.__('Notebook Operations')
    });

    const choose = async (panel: NotebookPanel): Promise<void> => {
      const notebook = NotebookSandbox.of(panel, sandboxes, trans);
      const picked = await pick({
        name: PathExt.basename(panel.context.path),
        choice: notebook.choice,
        hasKernel: notebook.kernel !== null,
        sandbox: notebook.sandbox,
        glance: notebook.glance,
        sandboxes,
        trans
      });
      if (picked === null || panel.isDisposed) {
        return;
      }
      const { choice, keeps } = picked;
      if (keeps) {
        await changeGpu(notebook, choice);
      } else {
        notebook.remember(choice);
        await applyChoice(notebook, choice);
      }
    };
  }
};
