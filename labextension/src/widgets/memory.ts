import { Notification } from '@jupyterlab/apputils';
import { PathExt } from '@jupyterlab/coreutils';

import type { NotebookSandbox } from '../model/notebook';
import * as words from '../model/words';

/** Save the memory of a notebook's kernel and end its processes; if that is refused, say why. */
export async function suspend(notebook: NotebookSandbox): Promise<void> {
  await orSayWhy(notebook, id => notebook.sandboxes.suspend(id));
}

/** Have a notebook's kernel go on; if it cannot, say why. */
export async function resume(notebook: NotebookSandbox): Promise<void> {
  await orSayWhy(notebook, id => notebook.sandboxes.resume(id));
}

async function orSayWhy(
  notebook: NotebookSandbox,
  work: (id: string) => Promise<void>
): Promise<void> {
  const { sandbox, context } = notebook;
  if (sandbox === null) {
    return;
  }
  try {
    await work(sandbox.id);
  } catch (reason) {
    const { message, hint } = words.asError(reason);
    const name = PathExt.basename(context.path);
    Notification.error(
      [`${name}:`, words.sentence(message), words.sentence(hint)].join(' ').trim(),
      { autoClose: false }
    );
  }
}
