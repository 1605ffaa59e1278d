import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import type { NotebookPanel } from '@jupyterlab/notebook';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { DisposableDelegate, type IDisposable } from '@lumino/disposable';

import { EarlyWake, isWriting } from '../model/earlyWake';
import { NotebookSandbox } from '../model/notebook';
import { DOMAIN, ISandboxes } from '../tokens';

const SIGNS = ['keydown', 'pointerdown', 'paste'] as const;

/** Where code is written. */
const EDITOR = '.jp-CodeCell .jp-InputArea-editor';

/**
 * Has a parked kernel go on while its next cell is still being written.
 */
export const waking: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:waking',
  description:
    'Has a parked kernel go on as soon as somebody comes back to its notebook, or writes in it.',
  autoStart: true,
  requires: [ISandboxes],
  optional: [ITranslator],
  activate: (app: JupyterFrontEnd, sandboxes: ISandboxes, translator: ITranslator | null): void => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    app.docRegistry.addWidgetExtension('Notebook', {
      createNew: (panel: NotebookPanel): IDisposable => {
        const notebook = NotebookSandbox.of(panel, sandboxes, trans);
        const early = new EarlyWake((id, returned) => sandboxes.wake(id, returned));
        const { node } = panel.content;
        const heed = (event: Event): void => {
          if (!(event instanceof KeyboardEvent) || isWriting(event)) {
            early.touch(
              notebook.sandbox,
              event.target instanceof Element && event.target.closest(EDITOR) !== null
            );
          }
        };
        // Before the editor, which keeps some of them to itself.
        for (const sign of SIGNS) {
          node.addEventListener(sign, heed, { capture: true, passive: true });
        }
        return new DisposableDelegate(() => {
          for (const sign of SIGNS) {
            node.removeEventListener(sign, heed, { capture: true });
          }
        });
      }
    });
  }
};
