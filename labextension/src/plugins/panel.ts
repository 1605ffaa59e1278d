import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { INotebookTracker } from '@jupyterlab/notebook';
import { IRunningSessionSidebar } from '@jupyterlab/running';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { SidePanel } from '@jupyterlab/ui-components';

import type { EntryAction, IEntry } from '../model/entries';
import { DOMAIN, ISandboxes, IUsageFeed } from '../tokens';
import { fork, forkHost, type ICopied, openClone } from '../widgets/forking';
import {
  type ITarget,
  leaveQueue,
  park,
  resume,
  saveSnapshot,
  stop,
  suspend
} from '../widgets/memory';
import { openPort } from '../widgets/ports';
import { SandboxesSection } from '../widgets/sandboxesSection';

/**
 * All sandboxes, in the list of what runs: whose they are, what they use, and what can be done with them.
 */
export const panel: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:panel',
  description: 'Lists all sandboxes beside what else runs.',
  autoStart: true,
  requires: [ISandboxes, IUsageFeed, INotebookTracker],
  // Without that sidebar, as in Jupyter Notebook, there is no place for it.
  optional: [IRunningSessionSidebar, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    usage: IUsageFeed,
    tracker: INotebookTracker,
    sidebar: IRunningSessionSidebar | null,
    translator: ITranslator | null
  ): void => {
    if (sidebar === null) {
      return;
    }
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const { sessions } = app.serviceManager;
    const host = forkHost(app);

    const copied = (path: string): ICopied => ({
      path,
      content: tracker.find(one => one.context.path === path)?.model?.toJSON()
    });

    const target = ({ sandbox, name }: IEntry): ITarget => ({
      id: sandbox.id,
      kernelId: sandbox.kernel_id,
      name,
      sandboxes,
      trans
    });

    const act = async (entry: IEntry, action: EntryAction): Promise<void> => {
      const it = target(entry);
      switch (action) {
        case 'cancel':
          return leaveQueue(it);
        case 'resume':
          return resume(it);
        case 'park':
          return park(it);
        case 'suspend':
          return suspend(it);
        case 'snapshot':
          return saveSnapshot(it);
        case 'fork':
          return entry.path === null ? undefined : fork(it, copied(entry.path), host);
        case 'port':
          return openPort(it);
        case 'stop':
          return stop(it);
      }
    };

    const open = async (entry: IEntry): Promise<void> => {
      if (entry.path !== null) {
        await (entry.isClone
          ? openClone(target(entry), copied(entry.path), host)
          : app.commands.execute('docmanager:open', { path: entry.path }));
      }
    };

    const section = new SandboxesSection({
      sandboxes,
      usage,
      pathOf: kernelId =>
        [...sessions.running()].find(
          ({ kernel, type }) => kernel?.id === kernelId && type === 'notebook'
        )?.path ?? null,
      pathsChanged: sessions.runningChanged,
      act: (entry, action) => void act(entry, action),
      open: entry => void open(entry),
      trans
    });
    if (sidebar instanceof SidePanel) {
      sidebar.insertWidget(0, section);
    } else {
      sidebar.reinsertSection(section);
    }
  }
};
