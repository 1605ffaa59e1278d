import { showErrorMessage } from '@jupyterlab/apputils';

import type { NotebookSandbox } from '../model/notebook';
import * as words from '../model/words';
import type { IChoice } from '../forms';
import { slowly } from './saying';

/** Restart a notebook's kernel with a choice; if that is refused, say why. */
export async function applyChoice(notebook: NotebookSandbox, choice: IChoice): Promise<void> {
  await orShowWhy(notebook, () => notebook.apply(choice));
}

/** Give a notebook's kernel the GPU of a choice that is then remembered, all variables kept; if it is refused, say why. */
export async function changeGpu(notebook: NotebookSandbox, choice: IChoice): Promise<void> {
  const { sandbox, sandboxes, trans } = notebook;
  if (sandbox === null) {
    return;
  }
  await orShowWhy(notebook, async () => {
    const changed = sandboxes.changeGpu(sandbox.id, choice.gpu ?? null);
    await slowly(trans.__('Changing the GPU…'), changed);
    notebook.remember(choice);
  });
}

async function orShowWhy(notebook: NotebookSandbox, work: () => Promise<void>): Promise<void> {
  try {
    await work();
  } catch (reason) {
    const { message, hint } = words.asError(reason);
    await showErrorMessage(
      notebook.trans.__('The choice could not be applied'),
      [words.sentence(message), words.sentence(hint)].join(' ').trim()
    );
  }
}
