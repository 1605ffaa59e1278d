import { ReactWidget } from '@jupyterlab/ui-components';
import * as React from 'react';

import { metrics } from '../model/meters';
import type { NotebookSandbox } from '../model/notebook';
import type { IUsageFeed } from '../tokens';
import { Sparkline } from './sparkline';

export interface IMeterOptions {
  readonly notebook: NotebookSandbox;
  readonly usage: IUsageFeed;
}

/**
 * The toolbar item that shows what this notebook's kernel uses now.
 */
export class MeterItem extends ReactWidget {
  constructor(options: IMeterOptions) {
    super();
    this._options = options;
    this.addClass('wc-Meter');
    options.usage.changed.connect(this.update, this);
    options.notebook.changed.connect(this.update, this);
  }

  protected override render(): React.JSX.Element | null {
    const { notebook, usage } = this._options;
    const { sandbox, trans } = notebook;
    const { latest } = usage;
    if (sandbox?.state !== 'running' || latest === null) {
      return null;
    }
    const found = metrics(usage.history(sandbox.id), trans, sandbox.gpus.length > 0);
    if (found.length === 0) {
      return null;
    }
    const said = found.map(({ label, value }) => `${label} ${value}`).join(', ');
    const title = trans.__('This kernel uses: %1', said);
    return (
      <div className="wc-Meter-all" role="img" aria-label={title} title={title}>
        {found.map(({ id, label, value, points }) => (
          <span key={id} className="wc-Meter-one" data-metric={id}>
            <span className="wc-Meter-label">{label}</span>
            <Sparkline points={points} />
            <span className="wc-Meter-value">{value}</span>
          </span>
        ))}
      </div>
    );
  }

  private readonly _options: IMeterOptions;
}
