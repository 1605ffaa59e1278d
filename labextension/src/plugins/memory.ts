import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { INotebookTracker } from '@jupyterlab/notebook';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { NotebookSandbox } from '../model/notebook';
import { isBroken, isStarting } from '../model/situation';
import { canPark } from '../model/state';
import { CommandIDs, DOMAIN, ISandboxes } from '../tokens';
import { fork, forkHost, type ICopied } from '../widgets/forking';
import {
  type ITarget,
  park,
  restoreSnapshot,
  resume,
  saveSnapshot,
  suspend,
  targetOf
} from '../widgets/memory';
import { orSayWhy } from '../widgets/saying';
import { chooseSnapshot } from '../widgets/snapshots';

const COMMANDS = [
  CommandIDs.suspend,
  CommandIDs.resume,
  CommandIDs.park,
  CommandIDs.fork,
  CommandIDs.saveSnapshot,
  CommandIDs.restoreSnapshot
];

/**
 * Commands that suspend a notebook's kernel, have it go on, give its GPU back, fork it, save it and put it back. Their menu entries are in `schema/picker.json`.
 */
export const memory: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:memory',
  description: 'Suspends, resumes, parks, forks, saves and restores kernels.',
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

    const host = forkHost(app);

    const copied = (notebook: NotebookSandbox): ICopied => ({
      path: notebook.context.path,
      content: notebook.content()
    });

    const snapshots = async (target: ITarget, notebook: NotebookSandbox): Promise<void> => {
      await orSayWhy(target.name, async () => {
        const { name, kernelId } = target;
        const found = await sandboxes.snapshots(kernelId ?? '');
        const chosen = await chooseSnapshot({ name, found, sandboxes, trans });
        if (chosen?.action === 'fork') {
          await fork(target, copied(notebook), host, chosen.snapshot.id);
        } else if (chosen !== null) {
          await restoreSnapshot(target, chosen.snapshot);
        }
      });
    };

    const isSuspended = (): boolean => current()?.sandbox?.state === 'suspended';

    const isRunning = (): boolean => {
      const sandbox = current()?.sandbox ?? null;
      return sandbox?.state === 'running' && !isStarting(sandbox) && !isBroken(sandbox);
    };

    const isUsable = (): boolean => isRunning() || isSuspended();

    const add = (
      command: string,
      label: string,
      caption: string,
      isEnabled: () => boolean,
      work: (target: ITarget, notebook: NotebookSandbox) => Promise<void>
    ): void => {
      app.commands.addCommand(command, {
        label,
        caption,
        isEnabled,
        describedBy: { args: { type: 'object', properties: {} } },
        execute: async () => {
          const notebook = current();
          const target = notebook === null ? null : targetOf(notebook);
          if (notebook !== null && target !== null) {
            await work(target, notebook);
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
      isRunning,
      suspend
    );
    add(
      CommandIDs.resume,
      trans.__('Resume Kernel'),
      trans.__('Have the suspended kernel go on, with all its variables'),
      isSuspended,
      resume
    );
    add(
      CommandIDs.park,
      trans.__('Give GPU Back'),
      trans.__('Free the kernel’s GPU and keep all variables; its next cell takes a GPU again'),
      () => isRunning() && canPark(current()?.sandbox ?? null),
      park
    );
    add(
      CommandIDs.fork,
      trans.__('Fork Notebook and Kernel'),
      trans.__('Open a copy of the notebook with a copy of its kernel, all variables included'),
      isUsable,
      (target, notebook) => fork(target, copied(notebook), host)
    );
    add(
      CommandIDs.saveSnapshot,
      trans.__('Save Snapshot…'),
      trans.__('Save all variables under a name, to come back to them'),
      isRunning,
      saveSnapshot
    );
    add(
      CommandIDs.restoreSnapshot,
      trans.__('Snapshots…'),
      trans.__('Look at the kernel’s snapshots, and put it back to one or fork one'),
      isUsable,
      snapshots
    );
    sandboxes.changed.connect(() => {
      for (const command of COMMANDS) {
        app.commands.notifyCommandChanged(command);
      }
    });
  }
};
