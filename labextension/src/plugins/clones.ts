import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { PathExt } from '@jupyterlab/coreutils';
import { INotebookTracker } from '@jupyterlab/notebook';
import { IRunningSessionManagers, type IRunningSessions } from '@jupyterlab/running';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { Signal } from '@lumino/signaling';

import { clonesOf, type IClone } from '../model/clones';
import * as words from '../model/words';
import { DOMAIN, ISandboxes } from '../tokens';
import { sandboxIcon } from '../widgets/icons';
import { forkHost, openClone, stopClones } from '../widgets/memory';

/**
 * The clones that cells have made, in the list of what runs. They end with the kernel that they come from, unless they are opened.
 */
export const clones: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:clones',
  description: 'Lists the clones that cells have made.',
  autoStart: true,
  requires: [ISandboxes, INotebookTracker],
  optional: [IRunningSessionManagers, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    tracker: INotebookTracker,
    managers: IRunningSessionManagers | null,
    translator: ITranslator | null
  ): void => {
    if (managers === null) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const { kernels, sessions } = app.serviceManager;

    const all = (): IClone[] => {
      const listed = new Set([...kernels.running()].map(({ id }) => id));
      return clonesOf(sandboxes.all, id => listed.has(id));
    };

    /** The notebook of a kernel, relative to the server's root. */
    const pathOf = (kernelId: string | null): string | null => {
      const open = [...sessions.running()];
      return (
        open.find(({ kernel, type }) => kernel?.id === kernelId && type === 'notebook')?.path ??
        null
      );
    };

    const item = ({ sandbox, source }: IClone): IRunningSessions.IRunningItem => {
      const path = pathOf(source.kernel_id);
      const name = path === null ? trans.__('a kernel') : PathExt.basename(path);
      return {
        context: sandbox.id,
        icon: () => sandboxIcon,
        label: () => trans.__('Clone of %1', name),
        labelTitle: () =>
          trans.__(
            'Made by a cell of %1, in sandbox %2. It ends with that kernel, unless you open it as a notebook.',
            path ?? name,
            sandbox.id
          ),
        detail: () => (sandbox.state === 'running' ? '' : words.state(sandbox.state, trans)),
        ...(path === null
          ? {}
          : {
              open: () => {
                const content = tracker.find(panel => panel.context.path === path)?.model?.toJSON();
                void openClone({ sandbox, path, content, sandboxes, trans, host: forkHost(app) });
              }
            }),
        shutdown: () => {
          void stopClones([sandbox.id], sandboxes, trans);
        }
      };
    };

    const changed = new Signal<object, void>({});
    let shown = '';
    const look = (): void => {
      const now = all()
        .map(({ sandbox, source }) => [sandbox.id, sandbox.state, pathOf(source.kernel_id)].join())
        .join(';');
      if (now !== shown) {
        shown = now;
        changed.emit();
      }
    };
    sandboxes.changed.connect(look);
    kernels.runningChanged.connect(look);
    sessions.runningChanged.connect(look);

    managers.add({
      name: trans.__('Clones'),
      running: () => all().map(item),
      runningChanged: changed,
      refreshRunning: look,
      shutdownAll: () => {
        void stopClones(
          all().map(({ sandbox }) => sandbox.id),
          sandboxes,
          trans
        );
      },
      shutdownLabel: trans.__('Shut Down Clone'),
      shutdownAllLabel: trans.__('Shut Down All'),
      shutdownAllConfirmationText: trans.__(
        'Shut down all clones that cells have made? What they have computed is lost.'
      )
    });
  }
};
