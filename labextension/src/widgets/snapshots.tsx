import { Dialog } from '@jupyterlab/apputils';
import { Time } from '@jupyterlab/coreutils';
import type { TranslationBundle } from '@jupyterlab/translation';
import {
  closeIcon,
  downloadIcon,
  editIcon,
  fileUploadIcon,
  type LabIcon,
  ReactWidget
} from '@jupyterlab/ui-components';
import type { Message } from '@lumino/messaging';
import { type ISignal, Signal } from '@lumino/signaling';
import * as React from 'react';

import * as words from '../model/words';
import type { IErrorInfo, ISandboxes, ISnapshotInfo, ISnapshots } from '../tokens';

/** What archives of snapshots are called. */
const EXTENSION = '.warmcell';

export interface ISnapshotsOptions {
  /** The notebook's file name. */
  readonly name: string;
  /** What its kernel can be put back to, the newest first. */
  readonly found: ISnapshots;
  readonly sandboxes: ISandboxes;
  readonly trans: TranslationBundle;
}

/**
 * Let the user choose one of a kernel's snapshots; rename, take out, bring in and remove some.
 *
 * @returns the chosen one; null if there is none or the user cancelled.
 */
export async function chooseSnapshot(options: ISnapshotsOptions): Promise<ISnapshotInfo | null> {
  const { button, value } = await new SnapshotsDialog(options).launch();
  return button.accept ? value : null;
}

/** A dialog that can be accepted while one is chosen, and leaves the keys of a name to its field. */
class SnapshotsDialog extends Dialog<ISnapshotInfo | null> {
  constructor(options: ISnapshotsOptions) {
    const { trans } = options;
    const list = new SnapshotList(options);
    super({
      title: trans.__('Restore Snapshot of %1', options.name),
      body: list,
      buttons: [
        Dialog.cancelButton({ label: trans.__('Close') }),
        Dialog.okButton({ label: trans.__('Restore') })
      ],
      focusNodeSelector: 'input:checked, .wc-Snapshots-import'
    });
    this.addClass('wc-Snapshots');
    this._list = list;
    list.changed.connect(this._offer, this);
    this._offer();
  }

  override resolve(index?: number): void {
    const isClosing = index === 0;
    if (isClosing || this._list.getValue() !== null) {
      super.resolve(index);
    }
  }

  protected override _evtKeydown(event: KeyboardEvent): void {
    if (!(event.target instanceof HTMLInputElement && event.target.type === 'text')) {
      super._evtKeydown(event);
    }
  }

  private _offer(): void {
    const accept = this.node.querySelector<HTMLButtonElement>('.jp-Dialog-footer .jp-mod-accept');
    if (accept !== null) {
      accept.disabled = this._list.getValue() === null;
    }
  }

  private readonly _list: SnapshotList;
}

/** The list, of which one is chosen. */
class SnapshotList extends ReactWidget implements Dialog.IBodyWidget<ISnapshotInfo | null> {
  constructor(options: ISnapshotsOptions) {
    super();
    this._options = options;
    this._snapshots = options.found.snapshots;
    this._chosen = this._snapshots[0] ?? null;
  }

  /** Emitted when there may be more or fewer, or another is chosen. */
  get changed(): ISignal<this, void> {
    return this._changed;
  }

  /** The chosen one; null while it is about to be removed. */
  getValue(): ISnapshotInfo | null {
    return this._chosen?.id === this._removing ? null : this._chosen;
  }

  override dispose(): void {
    Signal.clearData(this);
    super.dispose();
  }

  protected override onUpdateRequest(message: Message): void {
    super.onUpdateRequest(message);
    this._changed.emit();
    const selector = this._focusNext;
    if (selector !== '') {
      this._focusNext = '';
      void this.renderPromise?.then(() => {
        this.node.querySelector<HTMLElement>(selector)?.focus();
      });
    }
  }

  protected override render(): React.JSX.Element {
    const { trans } = this._options;
    return (
      <form
        className="wc-Snapshots-form"
        onSubmit={event => {
          event.preventDefault();
        }}
      >
        {this._snapshots.length === 0 ? (
          <p className="wc-Snapshots-note">
            {trans.__(
              'This kernel has no snapshots. Save one with “Save Snapshot…” in the Kernel menu, or with %snapshot NAME in a cell.'
            )}
          </p>
        ) : (
          <>
            <fieldset className="wc-Snapshots-list" aria-label={trans.__('Snapshots')}>
              {this._snapshots.map(snapshot => this._row(snapshot))}
            </fieldset>
            <p className="wc-Snapshots-note">
              {trans.__(
                'All variables and private files become what they were. The notebook and its folder stay as they are.'
              )}
            </p>
          </>
        )}
        {this._importing()}
        <p className="wc-Snapshots-problem" role="alert">
          {this._problem === null
            ? ''
            : [this._problem.message, this._problem.hint].map(words.sentence).join(' ').trim()}
        </p>
      </form>
    );
  }

  private _row(snapshot: ISnapshotInfo): React.JSX.Element {
    const { trans, sandboxes } = this._options;
    const { id, name } = snapshot;
    if (this._removing === id) {
      return this._question(snapshot);
    }
    return (
      <div className="wc-Snapshots-row" key={id} data-snapshot={id}>
        {this._naming === id ? this._field(snapshot) : this._label(snapshot)}
        {this._button('rename', editIcon, trans.__('Rename snapshot %1', name), () => {
          this._naming = id;
          this.update();
        })}
        <a
          className="wc-Snapshots-action"
          href={sandboxes.snapshotUrl(id)}
          download=""
          title={trans.__(
            'Download snapshot %1. The file holds all that was in memory, passwords and keys included.',
            name
          )}
          aria-label={trans.__('Download snapshot %1', name)}
        >
          <downloadIcon.react tag="span" />
        </a>
        {this._button('remove', closeIcon, trans.__('Remove snapshot %1', name), () => {
          this._removing = id;
          this._focusNext = '.wc-Snapshots-keep';
          this.update();
        })}
      </div>
    );
  }

  private _label(snapshot: ISnapshotInfo): React.JSX.Element {
    const { trans } = this._options;
    const made = new Date(snapshot.created_at * 1000);
    const facts = [
      snapshot.kernel_id === null ? trans.__('imported') : '',
      Time.formatHuman(made),
      words.bytes(snapshot.image_bytes + snapshot.layer_bytes)
    ];
    return (
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
        <span className="wc-Snapshots-name" title={snapshot.name}>
          {snapshot.name || snapshot.id}
        </span>
        <span className="wc-Snapshots-facts" title={made.toLocaleString()}>
          {facts.filter(Boolean).join(' · ')}
        </span>
      </label>
    );
  }

  private _field(snapshot: ISnapshotInfo): React.JSX.Element {
    return (
      <input
        className="jp-mod-styled wc-Snapshots-field"
        type="text"
        autoFocus
        defaultValue={snapshot.name}
        aria-label={this._options.trans.__('New name of snapshot %1', snapshot.name)}
        onFocus={event => {
          event.target.select();
        }}
        onBlur={event => {
          void this._rename(snapshot, event.target.value);
        }}
        onKeyDown={event => {
          if (event.key === 'Enter' || event.key === 'Escape') {
            event.preventDefault();
            event.stopPropagation();
            this._focusNext = `[data-snapshot="${snapshot.id}"] .wc-mod-rename`;
            void this._rename(
              snapshot,
              event.key === 'Enter' ? event.currentTarget.value : snapshot.name
            );
          }
        }}
      />
    );
  }

  /** Whether that is really to go. */
  private _question(snapshot: ISnapshotInfo): React.JSX.Element {
    const { trans } = this._options;
    return (
      <div className="wc-Snapshots-row" key={snapshot.id} role="group">
        <span className="wc-Snapshots-label">
          {trans.__('Remove “%1” for good?', snapshot.name)}
        </span>
        <button
          type="button"
          className="jp-mod-styled jp-mod-minimal wc-Notice-button wc-Snapshots-keep"
          onClick={() => {
            this._removing = '';
            this._focusNext = `[data-snapshot="${snapshot.id}"] .wc-mod-remove`;
            this.update();
          }}
        >
          {trans.__('Keep')}
        </button>
        <button
          type="button"
          className="jp-mod-styled jp-mod-warn wc-Snapshots-sure"
          onClick={() => {
            void this._remove(snapshot);
          }}
        >
          {trans.__('Remove')}
        </button>
      </div>
    );
  }

  private _button(
    action: string,
    Icon: LabIcon,
    label: string,
    onClick: () => void
  ): React.JSX.Element {
    return (
      <button
        type="button"
        className={`wc-Snapshots-action wc-mod-${action}`}
        title={label}
        aria-label={label}
        onClick={onClick}
      >
        <Icon.react tag="span" />
      </button>
    );
  }

  private _importing(): React.JSX.Element {
    const { trans, found } = this._options;
    const isOff = !found.imports;
    return (
      <p className="wc-Snapshots-import-row">
        <button
          type="button"
          className="jp-mod-styled jp-mod-minimal wc-Notice-button wc-Snapshots-import"
          aria-disabled={isOff || this._incoming !== ''}
          title={
            isOff
              ? trans.__(
                  'This server takes no snapshots from elsewhere: a snapshot decides what runs when it is restored. The setting is c.Warmcell.import_snapshots.'
                )
              : trans.__('Bring in a file that was downloaded here or elsewhere')
          }
          onClick={() => {
            if (isOff) {
              this._problem = {
                code: 'unsupported',
                message: trans.__('This server takes no snapshots from elsewhere'),
                hint: trans.__('If you trust where they come from, set c.Warmcell.import_snapshots')
              };
              this.update();
            } else if (this._incoming === '') {
              this._picker.click();
            }
          }}
        >
          <fileUploadIcon.react tag="span" />
          {this._incoming === '' ? trans.__('Import…') : trans.__('Importing %1…', this._incoming)}
        </button>
      </p>
    );
  }

  /** The browser's own dialog for files. */
  private get _picker(): HTMLInputElement {
    const picker = document.createElement('input');
    picker.type = 'file';
    picker.accept = EXTENSION;
    picker.addEventListener('change', () => {
      const file = picker.files?.[0];
      if (file !== undefined) {
        void this._import(file);
      }
    });
    return picker;
  }

  private async _import(file: File): Promise<void> {
    this._incoming = file.name;
    this.update();
    await this._try(async () => {
      const brought = await this._options.sandboxes.importSnapshot(file);
      this._snapshots = [brought, ...this._snapshots];
      this._chosen = brought;
    });
    this._incoming = '';
    this._focusNext = 'input:checked, .wc-Snapshots-import';
    this.update();
  }

  private async _rename(snapshot: ISnapshotInfo, typed: string): Promise<void> {
    if (this._naming !== snapshot.id) {
      return; // Its field is just going.
    }
    this._naming = '';
    const name = typed.trim();
    if (name === '' || name === snapshot.name) {
      this.update();
      return;
    }
    await this._try(async () => {
      const renamed = await this._options.sandboxes.renameSnapshot(snapshot.id, name);
      this._snapshots = this._snapshots.map(one => (one.id === renamed.id ? renamed : one));
      if (this._chosen?.id === renamed.id) {
        this._chosen = renamed;
      }
    });
  }

  private async _remove(snapshot: ISnapshotInfo): Promise<void> {
    await this._try(async () => {
      await this._options.sandboxes.removeSnapshot(snapshot.id);
      this._snapshots = this._snapshots.filter(({ id }) => id !== snapshot.id);
      if (this._chosen?.id === snapshot.id) {
        this._chosen = this._snapshots[0] ?? null;
      }
      this._focusNext = 'input:checked, .wc-Snapshots-import';
    });
  }

  /** Do something; what stands in the way is said below the list. */
  private async _try(work: () => Promise<void>): Promise<void> {
    try {
      await work();
      this._problem = null;
    } catch (reason) {
      this._problem = words.asError(reason);
    }
    this._removing = '';
    this.update();
  }

  private readonly _options: ISnapshotsOptions;
  private readonly _changed = new Signal<this, void>(this);
  private _snapshots: readonly ISnapshotInfo[];
  private _chosen: ISnapshotInfo | null;
  private _problem: IErrorInfo | null = null;
  /** The one whose name is being typed, and the one that is about to be removed. */
  private _naming = '';
  private _removing = '';
  /** The file that is being sent. */
  private _incoming = '';
  /** What is focused after the next update. */
  private _focusNext = '';
}
