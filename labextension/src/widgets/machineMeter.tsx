import { TextItem } from '@jupyterlab/statusbar';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ReactWidget } from '@jupyterlab/ui-components';
import * as React from 'react';

import { machineShort, machineWhole } from '../model/meters';
import type { IUsageFeed } from '../tokens';

/**
 * The item in the status bar that shows what the machine uses now.
 */
export class MachineMeter extends ReactWidget {
  constructor(usage: IUsageFeed, trans: TranslationBundle) {
    super();
    this._usage = usage;
    this._trans = trans;
    this.addClass('wc-Machine');
    usage.changed.connect(this.update, this);
  }

  protected override render(): React.JSX.Element | null {
    const { latest } = this._usage;
    return latest === null ? null : (
      <TextItem
        title={machineWhole(latest, this._trans).join('\n')}
        source={machineShort(latest, this._trans).join(' · ')}
      />
    );
  }

  private readonly _usage: IUsageFeed;
  private readonly _trans: TranslationBundle;
}
