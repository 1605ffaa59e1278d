import { type LabIcon, ReactWidget } from '@jupyterlab/ui-components';
import * as React from 'react';

import type { IGlance } from '../model/glance';
import type { NotebookSandbox } from '../model/notebook';
import { Badges } from './badges';
import { failedIcon, noSandboxIcon, sandboxIcon, suspendedIcon } from './icons';

export interface IItemOptions {
  readonly notebook: NotebookSandbox;
  /** Choose what the sandbox gets. */
  readonly choose: () => void;
  /** Choose another kernel; offered where the kernel has no sandbox. */
  readonly selectKernel: () => void;
}

/**
 * The toolbar item: what the notebook's kernel runs on and how it was started.
 */
export class SandboxItem extends ReactWidget {
  constructor(options: IItemOptions) {
    super();
    this._options = options;
    this.addClass('wc-Item');
    // All of it is drawn anew, and what is hidden keeps no drawing of its own: on a busy machine one that began hidden
    // was seen to stay so, with a component in it that was to follow the signal.
    options.notebook.changed.connect(this.update, this);
  }

  protected override render(): React.JSX.Element | null {
    const { kind, label, title, badges } = this._options.notebook.glance;
    if (kind === 'hidden') {
      return null;
    }
    const { notebook, choose, selectKernel } = this._options;
    const isLocal = kind === 'local';
    const Icon = (ICONS[kind] ?? sandboxIcon).react;
    const action = isLocal
      ? notebook.trans.__('Click to choose another kernel.')
      : notebook.trans.__('Click to choose GPU, memory and network.');
    return (
      <button
        type="button"
        className={`wc-Item-button wc-mod-${kind}`}
        title={`${title}\n${action}`}
        aria-label={notebook.trans.__(
          'Sandbox: %1',
          [label, ...badges.map(badge => badge.label)].join(', ')
        )}
        aria-haspopup="dialog"
        onClick={isLocal ? selectKernel : choose}
      >
        <Icon className="wc-Item-icon" tag="span" />
        <span className="wc-Item-label">{label}</span>
        <Badges badges={badges} />
      </button>
    );
  }

  private readonly _options: IItemOptions;
}

/** Where it is not the usual one. */
const ICONS: Partial<Record<IGlance['kind'], LabIcon>> = {
  local: noSandboxIcon,
  failed: failedIcon,
  suspended: suspendedIcon
};
