import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { Notification } from '@jupyterlab/apputils';
import { PathExt } from '@jupyterlab/coreutils';
import { INotebookTracker } from '@jupyterlab/notebook';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { NotebookSandbox } from '../model/notebook';
import { isBroken } from '../model/situation';
import * as words from '../model/words';
import type { ISandboxInfo } from '../forms';
import { DOMAIN, ISandboxes } from '../tokens';
import { VERSION } from '../version';

/**
 * Notifications for what is not in sight: failures in notebooks behind other tabs, and a page that does not fit its
 * server.
 */
export const notices: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:notices',
  description: 'Notifies of failed starts in hidden notebooks and of version mismatch.',
  autoStart: true,
  requires: [ISandboxes, INotebookTracker],
  optional: [ITranslator],
  activate: (
    app: JupyterFrontEnd,
    sandboxes: ISandboxes,
    tracker: INotebookTracker,
    translator: ITranslator | null
  ): void => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const told = new Set<string>();

    sandboxes.told.connect((_, sandbox: ISandboxInfo) => {
      const { error } = sandbox;
      const key = `${sandbox.id}/${sandbox.generation}`;
      if (error === null || !isBroken(sandbox) || told.has(key)) {
        return;
      }
      const panel = tracker.find(
        one => NotebookSandbox.of(one, sandboxes, trans).sandbox?.id === sandbox.id
      );
      if (panel === undefined || panel.isVisible) {
        return; // Not of this page, or its own banner says it.
      }
      told.add(key);
      Notification.error(
        [
          `${PathExt.basename(panel.context.path)}:`,
          words.sentence(error.message),
          words.sentence(error.hint)
        ].join(' '),
        {
          autoClose: false,
          actions: [
            {
              label: trans.__('Show'),
              callback: () => {
                app.shell.activateById(panel.id);
              }
            }
          ]
        }
      );
    });

    const compare = (): void => {
      const { version } = sandboxes;
      if (version === null) {
        return;
      }
      sandboxes.changed.disconnect(compare);
      if (version !== VERSION) {
        Notification.warning(
          trans.__(
            'This page has Warmcell %1, its server %2. Reload the page; if this stays, install the same version of warmcell for JupyterLab and the server and restart it.',
            VERSION,
            version
          ),
          { autoClose: false }
        );
      }
    };
    sandboxes.changed.connect(compare);
  }
};
