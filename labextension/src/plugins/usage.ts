import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';

import { UsageFeed } from '../model/usage';
import { ISandboxes, IUsageFeed } from '../tokens';

/**
 * What sandboxes and machine use: one poll for all widgets.
 */
export const usage: JupyterFrontEndPlugin<IUsageFeed> = {
  id: '@warmcell/labextension:usage',
  description: 'Asks what the sandboxes of this server and its machine use.',
  autoStart: true,
  requires: [ISandboxes],
  provides: IUsageFeed,
  activate: (app: JupyterFrontEnd, sandboxes: ISandboxes): IUsageFeed => {
    const feed = new UsageFeed(sandboxes);
    void app.started.then(() => {
      feed.start();
    });
    return feed;
  }
};
