import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { PageConfig } from '@jupyterlab/coreutils';

import { Api } from '../api';
import { SandboxesModel } from '../model/sandboxes';
import { ISandboxes } from '../tokens';

/**
 * What the page knows about sandboxes: one event stream for all widgets.
 */
export const sandboxes: JupyterFrontEndPlugin<ISandboxes> = {
  id: '@warmcell/labextension:sandboxes',
  description: 'Follows the sandboxes of this server.',
  autoStart: true,
  provides: ISandboxes,
  activate: (app: JupyterFrontEnd): ISandboxes => {
    const model = new SandboxesModel(
      new Api(app.serviceManager.serverSettings),
      PageConfig.getOption('serverRoot')
    );
    void app.started.then(() => {
      model.start();
    });
    return model;
  }
};
