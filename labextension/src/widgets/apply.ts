import { showErrorMessage } from '@jupyterlab/apputils';

import type { NotebookSandbox } from '../model/notebook';
import * as words from '../model/words';
import type { IChoice } from '../tokens';

/** Restart a notebook's kernel with a choice; if that is refused, say why. */
export async function applyChoice(notebook: NotebookSandbox, choice: IChoice): Promise<void> {
  try {
    await notebook.apply(choice);
  } catch (reason) {
    const { message, hint } = words.asError(reason);
    await showErrorMessage(
      notebook.trans.__('The choice could not be applied'),
      [words.sentence(message), words.sentence(hint)].join(' ').trim()
    );
  }
}
