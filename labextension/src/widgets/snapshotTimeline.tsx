import type { Dialog } from '@jupyterlab/apputils';
import type { TranslationBundle } from '@jupyterlab/translation';
import { fileUploadIcon, ReactWidget } from '@jupyterlab/ui-components';
import type { Message } from '@lumino/messaging';
import { type ISignal, Signal } from '@lumino/signaling';
import * as React from 'react';

import { type IMoment, timeline } from '../model/timeline';
import * as words from '../model/words';
import type { IErrorInfo, IKernelSnapshots, ISnapshotInfo } from '../forms';
import type { ISandboxes } from '../tokens';
import { type IRowActions, NowRow, SnapshotRow } from './snapshotRow';

/** What archives of snapshots are called. */
const EXTENSION = '.warmcell';

export interface ISnapshotsOptions {
  /** The notebook's file name. */
  readonly name: string;
  /** What its kernel can be put back to, the newest first. */
  readonly found: IKernelSnapshots;
  readonly sandboxes: ISandboxes;
  readonly trans: TranslationBundle;
}

/** A kernel's snapshots in time, of which one is chosen. */
export class SnapshotTimeline
  extends ReactWidget
  implements Dialog.IBodyWidget<ISnapshotInfo | null>
{
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
              {timeline(this._snapshots, this._options.found.now).map(moment => this._row(moment))}
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

  private _row(moment: IMoment): React.JSX.Element {
    const { trans, sandboxes } = this._options;
    const { snapshot } = moment;
    if (snapshot === null) {
      return <NowRow key="now" moment={moment} trans={trans} />;
    }
    const { id } = snapshot;
    return (
      <SnapshotRow
        key={id}
        snapshot={snapshot}
        moment={moment}
        url={sandboxes.snapshotUrl(id)}
        isChosen={this._chosen?.id === id}
        isNaming={this._naming === id}
        isRemoving={this._removing === id}
        trans={trans}
        {...this._actions}
      />
    );
  }

  private readonly _actions: IRowActions = {
    choose: snapshot => {
      this._chosen = snapshot;
      this.update();
    },
    name: ({ id }) => {
      this._naming = id;
      this.update();
    },
    rename: (snapshot, typed, key) => {
      if (key !== null) {
        this._focusNext = `[data-snapshot="${snapshot.id}"] .wc-mod-rename`;
      }
      void this._rename(snapshot, key === 'Escape' ? snapshot.name : typed);
    },
    ask: ({ id }) => {
      this._removing = id;
      this._focusNext = '.wc-Snapshots-keep';
      this.update();
    },
    keep: ({ id }) => {
      this._removing = '';
      this._focusNext = `[data-snapshot="${id}"] .wc-mod-remove`;
      this.update();
    },
    remove: snapshot => {
      void this._remove(snapshot);
    }
  };

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
