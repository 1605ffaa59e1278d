import type { JupyterFrontEnd } from '@jupyterlab/application';
import { InputDialog, Notification } from '@jupyterlab/apputils';
import { PathExt } from '@jupyterlab/coreutils';
import type { Contents } from '@jupyterlab/services';
import type { TranslationBundle } from '@jupyterlab/translation';

import { freeName } from '../model/names';
import type { NotebookSandbox } from '../model/notebook';
import * as words from '../model/words';
import type { ISandboxes, ISandboxInfo } from '../tokens';
import { chooseSnapshot } from './snapshots';

/** Work that takes longer than this says that it goes on. */
const SLOW_MS = 700;

const SAID_MS = 5000;

/** Save the memory of a notebook's kernel and end its processes; if that is refused, say why. */
export async function suspend(notebook: NotebookSandbox): Promise<void> {
  await orSayWhy(notebook, id => notebook.sandboxes.suspend(id));
}

/** Have a notebook's kernel go on; if it cannot, say why. */
export async function resume(notebook: NotebookSandbox): Promise<void> {
  await orSayWhy(notebook, id => notebook.sandboxes.resume(id));
}

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

/** Clone a notebook's kernel and open a copy of the notebook, as it is in the page, with the clone. */
export async function fork(notebook: NotebookSandbox, host: IForkHost): Promise<void> {
  const { sandboxes, trans } = notebook;
  const pending = trans.__('Forking %1…', nameOf(notebook));
  await orSayWhy(notebook, async id => {
    const content = notebook.content();
    const clone = await slowly(pending, sandboxes.fork(id));
    try {
      await openCopy(host, notebook.context.path, content, clone.kernel_id);
    } catch (reason) {
      await sandboxes.stop(clone.id);
      throw reason;
    }
  });
}

export interface IOpenOptions {
  /** The clone. */
  readonly sandbox: ISandboxInfo;
  /** The notebook whose cell has made it, and its content as it is in the page; undefined: as it is on disk. */
  readonly path: string;
  readonly content: unknown;
  readonly sandboxes: ISandboxes;
  readonly trans: TranslationBundle;
  readonly host: IForkHost;
}

/** Open a copy of a notebook with a clone that one of its cells has made; if that cannot be, say why. */
export async function openClone(options: IOpenOptions): Promise<void> {
  const { sandbox, sandboxes, path, host } = options;
  try {
    const content: unknown = options.content ?? (await host.contents.get(path)).content;
    await sandboxes.open(sandbox.id);
    await openCopy(host, path, content, sandbox.kernel_id);
  } catch (reason) {
    sayWhy(PathExt.basename(path), reason);
  }
}

/** End clones; if one does not, say why. */
export async function stopClones(
  ids: readonly string[],
  sandboxes: ISandboxes,
  trans: TranslationBundle
): Promise<void> {
  for (const ended of await Promise.allSettled(ids.map(id => sandboxes.stop(id)))) {
    if (ended.status === 'rejected') {
      sayWhy(trans.__('Clone'), ended.reason);
    }
  }
}

/** Ask for a name and save a notebook's kernel under it. */
export async function saveSnapshot(notebook: NotebookSandbox): Promise<void> {
  const { sandboxes, trans } = notebook;
  const { button, value } = await InputDialog.getText({
    title: trans.__('Save Snapshot of %1', nameOf(notebook)),
    label: trans.__('All variables and private files as they are now, to come back to. Its name:'),
    placeholder: trans.__('before training'),
    okLabel: trans.__('Save'),
    required: true
  });
  const name = value?.trim() ?? '';
  if (!button.accept || name === '') {
    return;
  }
  const pending = trans.__('Saving “%1”…', name);
  await orSayWhy(notebook, async id => {
    const saved = await slowly(pending, sandboxes.saveSnapshot(id, name));
    const size = words.bytes(saved.image_bytes + saved.layer_bytes);
    Notification.success(trans.__('Saved “%1” (%2)', name, size), { autoClose: SAID_MS });
  });
}

/** Let the user choose a snapshot of a notebook's kernel, and put the kernel back to it. */
export async function restoreSnapshot(notebook: NotebookSandbox): Promise<void> {
  const { sandboxes, trans } = notebook;
  await orSayWhy(notebook, async (id, kernelId) => {
    const chosen = await chooseSnapshot({
      name: nameOf(notebook),
      found: await sandboxes.snapshots(kernelId),
      sandboxes,
      trans
    });
    if (chosen === null) {
      return;
    }
    const pending = trans.__('Going back to “%1”…', chosen.name);
    await slowly(pending, sandboxes.restoreSnapshot(id, chosen.id));
    Notification.success(trans.__('The kernel is as it was in “%1”', chosen.name), {
      autoClose: SAID_MS
    });
  });
}

function nameOf(notebook: NotebookSandbox): string {
  return PathExt.basename(notebook.context.path);
}

/** Open a copy of a notebook with a kernel that runs. */
async function openCopy(
  host: IForkHost,
  notebook: string,
  content: unknown,
  kernelId: string | null
): Promise<void> {
  const path = await freePath(host.contents, notebook);
  await host.contents.save(path, { type: 'notebook', format: 'json', content });
  await host.open(path, kernelId ?? '');
}

/** A path beside a notebook that nothing has. */
async function freePath(contents: Contents.IManager, path: string): Promise<string> {
  const local = contents.localPath(path);
  const folder = PathExt.dirname(local);
  const listing = await contents.get(folder, { content: true });
  const taken = (listing.content as Contents.IModel[]).map(item => item.name);
  return PathExt.join(folder, freeName(PathExt.basename(local), taken));
}

/** Await work; while it takes long, a notification says so. */
async function slowly<T>(pending: string, work: Promise<T>): Promise<T> {
  let shown = '';
  const timer = window.setTimeout(() => {
    shown = Notification.emit(pending, 'in-progress', { autoClose: false });
  }, SLOW_MS);
  try {
    return await work;
  } finally {
    window.clearTimeout(timer);
    if (shown !== '') {
      Notification.dismiss(shown);
    }
  }
}

async function orSayWhy(
  notebook: NotebookSandbox,
  work: (id: string, kernelId: string) => Promise<void>
): Promise<void> {
  const { sandbox } = notebook;
  if (sandbox === null) {
    return;
  }
  try {
    await work(sandbox.id, sandbox.kernel_id ?? '');
  } catch (reason) {
    sayWhy(nameOf(notebook), reason);
  }
}

function sayWhy(who: string, reason: unknown): void {
  const { message, hint } = words.asError(reason);
  Notification.error([`${who}:`, words.sentence(message), words.sentence(hint)].join(' ').trim(), {
    autoClose: false
  });
}
