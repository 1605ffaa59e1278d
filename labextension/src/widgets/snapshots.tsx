import { Dialog } from '@jupyterlab/apputils';
import { Time } from '@jupyterlab/coreutils';
import type { TranslationBundle } from '@jupyterlab/translation';
import { closeIcon, ReactWidget } from '@jupyterlab/ui-components';
import * as React from 'react';

import * as words from '../model/words';
import type { IErrorInfo, ISandboxes, ISnapshotInfo } from '../tokens';

export interface ISnapshotsOptions {
  /** The notebook's file name. */
  readonly name: string;
  /** Its kernel's snapshots, the newest first. */
  readonly snapshots: readonly ISnapshotInfo[];
  readonly sandboxes: ISandboxes;
  readonly trans: TranslationBundle;
}

/**
 * Let the user choose one of a kernel's snapshots, or remove some.
 *
 * @returns the chosen one; null if there is none or the user cancelled.
 */
export async function chooseSnapshot(options: ISnapshotsOptions): Promise<ISnapshotInfo | null> {
  const { trans } = options;
  const isEmpty = options.snapshots.length === 0;
  const dialog = new Dialog<ISnapshotInfo | null>({
    title: trans.__('Restore Snapshot of %1', options.name),
    body: new SnapshotList(options),
    buttons: isEmpty
      ? [Dialog.cancelButton({ label: trans.__('Close') })]
      : [Dialog.cancelButton(), Dialog.okButton({ label: trans.__('Restore') })],
    focusNodeSelector: isEmpty ? 'button' : 'input:checked'
  });
  dialog.addClass('wc-Snapshots');
  const { button, value } = await dialog.launch();
  return button.accept ? value : null;
}

/** The list, of which one is chosen. */
class SnapshotList extends ReactWidget implements Dialog.IBodyWidget<ISnapshotInfo | null> {
  constructor(options: ISnapshotsOptions) {
    super();
    this._options = options;
    this._snapshots = options.snapshots;
    this._chosen = options.snapshots[0] ?? null;
  }

  getValue(): ISnapshotInfo | null {
    return this._chosen;
  }

  protected override render(): React.JSX.Element {
    const { trans } = this._options;
    if (this._snapshots.length === 0) {
      return (
        <p className="wc-Snapshots-note">
          {trans.__(
            'This kernel has no snapshots. Save one with “Save Snapshot…” in the Kernel menu, or with %snapshot NAME in a cell.'
          )}
        </p>
      );
    }
    return (
      <form
        className="wc-Snapshots-form"
        onSubmit={event => {
          event.preventDefault();
        }}
      >
        <fieldset className="wc-Snapshots-list" aria-label={trans.__('Snapshots')}>
          {this._snapshots.map(snapshot => this._row(snapshot))}
        </fieldset>
        <p className="wc-Snapshots-note">
          {trans.__(
            'All variables and private files become what they were. The notebook and its folder stay as they are.'
          )}
        </p>
        <p className="wc-Snapshots-problem" role="alert">
          {this._problem === null
            ? ''
            : [this._problem.message, this._problem.hint].map(words.sentence).join(' ').trim()}
        </p>
      </form>
    );
  }

  private _row(snapshot: ISnapshotInfo): React.JSX.Element {
    const { trans } = this._options;
    const made = new Date(snapshot.created_at * 1000);
    const size = words.bytes(snapshot.image_bytes + snapshot.layer_bytes);
    return (
      <div className="wc-Snapshots-row" key={snapshot.id}>
        <label className="wc-Snapshots-label">
          <input
            type="radio"
            name="wc-snapshot"
            checked={this._chosen?.id === snapshot.id}
            onChange={() => {
              this._chosen = snapshot;
              this.update();
            }}
          />
          <span className="wc-Snapshots-name">{snapshot.name}</span>
          <span className="wc-Snapshots-facts" title={made.toLocaleString()}>
            {`${Time.formatHuman(made)} · ${size}`}
          </span>
        </label>
        <button
          type="button"
          className="wc-Snapshots-remove"
          title={trans.__('Remove this snapshot')}
          aria-label={trans.__('Remove snapshot %1', snapshot.name)}
          onClick={() => {
            void this._remove(snapshot);
          }}
        >
          <closeIcon.react tag="span" />
        </button>
      </div>
    );
  }

  private async _remove(snapshot: ISnapshotInfo): Promise<void> {
    try {
      await this._options.sandboxes.removeSnapshot(snapshot.id);
      this._problem = null;
      this._snapshots = this._snapshots.filter(({ id }) => id !== snapshot.id);
      if (this._chosen?.id === snapshot.id) {
        this._chosen = this._snapshots[0] ?? null;
      }
    } catch (reason) {
      this._problem = words.asError(reason);
    }
    this.update();
  }

  private readonly _options: ISnapshotsOptions;
  private _snapshots: readonly ISnapshotInfo[];
  private _chosen: ISnapshotInfo | null;
  private _problem: IErrorInfo | null = null;
}
