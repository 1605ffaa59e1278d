import type { JupyterFrontEnd } from '@jupyterlab/application';
import { PathExt } from '@jupyterlab/coreutils';
import type { Contents } from '@jupyterlab/services';

import { removeCopy, saveCopy } from '../model/copies';
import type { ITarget } from './memory';
import { orSayWhy, slowly } from './saying';

/** What a fork needs of the application. */
export interface IForkHost {
  readonly contents: Contents.IManager;
  /** Open a notebook with a kernel that runs. */
  readonly open: (path: string, kernelId: string) => Promise<void>;
}

/** That of this application. */
export function forkHost(app: JupyterFrontEnd): IForkHost {
  return {
    contents: app.serviceManager.contents,
    open: async (path, id) => {
      await app.commands.execute('docmanager:open', { path, factory: 'Notebook', kernel: { id } });
    }
  };
}

/** A notebook, and what it has in the page; undefined: as it is on disk. */
export interface ICopied {
  readonly path: string;
  readonly content: unknown;
}

/**
 * Clone a kernel and open a copy of its notebook with the clone.
 *
 * @param snapshotId - What the clone is to be; absent: the kernel as it is.
 */
export async function fork(
  { id, name, sandboxes, trans }: ITarget,
  copied: ICopied,
  host: IForkHost,
  snapshotId?: string
): Promise<void> {
  await orSayWhy(name, async () => {
    const content = await contentOf(copied, host);
    const clone = await slowly(trans.__('Forking %1…', name), sandboxes.fork(id, snapshotId));
    try {
      await openCopy(host, copied.path, content, clone.kernel_id);
    } catch (reason) {
      await sandboxes.stop(clone.id);
      throw reason;
    }
  });
}

/** Open a copy of a notebook with a clone that one of its cells has made; if that cannot be, say why. */
export async function openClone(
  { id, kernelId, sandboxes }: ITarget,
  copied: ICopied,
  host: IForkHost
): Promise<void> {
  await orSayWhy(PathExt.basename(copied.path), async () => {
    const content = await contentOf(copied, host);
    await sandboxes.open(id);
    await openCopy(host, copied.path, content, kernelId);
  });
}

async function contentOf({ path, content }: ICopied, host: IForkHost): Promise<unknown> {
  return content ?? (await host.contents.get(path)).content;
}

/** Open a copy of a notebook with a kernel that runs. */
async function openCopy(
  host: IForkHost,
  notebook: string,
  content: unknown,
  kernelId: string | null
): Promise<void> {
  const path = await saveCopy(host.contents, notebook, content);
  try {
    await host.open(path, kernelId ?? '');
  } catch (reason) {
    await removeCopy(host.contents, path); // Without its kernel it is of no use.
    throw reason;
  }
}
