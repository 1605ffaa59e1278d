import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { INotebookTracker } from '@jupyterlab/notebook';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { NotebookSandbox } from '../model/notebook';
import { isBroken, isStarting } from '../model/situation';
import { CommandIDs, DOMAIN, ISandboxes } from '../tokens';
import { resume, suspend } from '../widgets/memory';

/**
 * Commands that suspend a notebook's kernel and have it go on. Their menu entries are in `schema/picker.json`.
 */
export const memory: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:memory',
  description: 'Suspends kernels to disk and has them go on.',
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

    const current = (): NotebookSandbox | null =>
      tracker.currentWidget === null
        ? null
        : NotebookSandbox.of(tracker.currentWidget, sandboxes, trans);

    const canSuspend = (): boolean => {
      const sandbox = current()?.sandbox ?? null;
      return sandbox?.state === 'running' && !isStarting(sandbox) && !isBroken(sandbox);
    };

    const add = (
      command: string,
      label: string,
      caption: string,
      isEnabled: () => boolean,
      work: (notebook: NotebookSandbox) => Promise<void>
    ): void => {
      app.commands.addCommand(command, {
        label,
        caption,
        isEnabled,
        describedBy: { args: { type: 'object', properties: {} } },
        execute: async () => {
          const notebook = current();
          if (notebook !== null) {
            await work(notebook);
          }
        }
      });
      palette?.addItem({ command, category: trans.__('Notebook Operations') });
    };

    add(
      CommandIDs.suspend,
      trans.__('Suspend Kernel'),
      trans.__(
        'Put the kernel’s memory on disk and free what it holds; its next cell has it go on'
      ),
      canSuspend,
      suspend
    );
    add(
      CommandIDs.resume,
      trans.__('Resume Kernel'),
      trans.__('Have the suspended kernel go on, with all its variables'),
      () => current()?.sandbox?.state === 'suspended',
      resume
    );
    sandboxes.changed.connect(() => {
      app.commands.notifyCommandChanged(CommandIDs.suspend);
      app.commands.notifyCommandChanged(CommandIDs.resume);
    });
  }
};
