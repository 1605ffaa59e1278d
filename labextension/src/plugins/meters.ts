import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { IToolbarWidgetRegistry } from '@jupyterlab/apputils';
import type { NotebookPanel } from '@jupyterlab/notebook';
import { IStatusBar } from '@jupyterlab/statusbar';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { NotebookSandbox } from '../model/notebook';
import { DOMAIN, ISandboxes, IUsageFeed } from '../tokens';
import { MachineMeter } from '../widgets/machineMeter';
import { MeterItem } from '../widgets/meterItem';

/**
 * Meters: of each notebook's kernel in its toolbar (the place is in `schema/toolbar.json`), of the machine in the status bar.
 */
export const meters: JupyterFrontEndPlugin<void> = {
  id: '@warmcell/labextension:meters',
  description: 'Shows what each kernel, and the machine, uses.',
  autoStart: true,
  requires: [ISandboxes, IUsageFeed],
  optional: [IToolbarWidgetRegistry, IStatusBar, ITranslator],
  activate: (
    _: JupyterFrontEnd,
    sandboxes: ISandboxes,
    usage: IUsageFeed,
    registry: IToolbarWidgetRegistry | null,
    statusBar: IStatusBar | null,
    translator: ITranslator | null
  ): void => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    registry?.addFactory<NotebookPanel>(
      'Notebook',
      'warmcell-meter',
      panel => new MeterItem({ notebook: NotebookSandbox.of(panel, sandboxes, trans), usage })
    );
    statusBar?.registerStatusItem(meters.id, {
      item: new MachineMeter(usage, trans),
      align: 'left',
      rank: 100
    });
  }
};
