import { Dialog } from '@jupyterlab/apputils';

import type { ISnapshotInfo } from '../forms';
import { type ISnapshotsOptions, SnapshotTimeline } from './snapshotTimeline';

/** What is to be done with which snapshot. */
export interface IChosen {
  readonly action: 'restore' | 'fork';
  readonly snapshot: ISnapshotInfo;
}

const FORK = 'fork';

/**
 * Show a kernel's snapshots; let the user choose one, rename, take out, bring in and remove some.
 *
 * @returns what to do with the chosen one; null if there is none or the user cancelled.
 */
export async function chooseSnapshot(options: ISnapshotsOptions): Promise<IChosen | null> {
  const { button, value } = await new SnapshotsDialog(options).launch();
  return button.accept && value !== null
    ? { action: button.actions.includes(FORK) ? 'fork' : 'restore', snapshot: value }
    : null;
}

/** A dialog that can be accepted while one is chosen, with its buttons alone. */
class SnapshotsDialog extends Dialog<ISnapshotInfo | null> {
  constructor(options: ISnapshotsOptions) {
    const { trans } = options;
    const list = new SnapshotTimeline(options);
    super({
      title: trans.__('Snapshots of %1', options.name),
      body: list,
      buttons: [
        Dialog.cancelButton({ label: trans.__('Close') }),
        Dialog.okButton({
          label: trans.__('Fork'),
          caption: trans.__('Open a copy of the notebook with a kernel as it was then'),
          className: 'wc-Snapshots-fork',
          actions: [FORK]
        }),
        Dialog.okButton({
          label: trans.__('Restore'),
          caption: trans.__('Put this notebook’s kernel back to what it was then')
        })
      ],
      defaultButton: 2,
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

  /**
   * Enter in a field is none for the dialog: it would restore, which takes all variables of now, and the focus may have
   * come to a field while the key was on its way. The keys of a name are its field's.
   */
  protected override _evtKeydown(event: KeyboardEvent): void {
    const { target, key } = event;
    if (!(target instanceof HTMLInputElement && (key === 'Enter' || target.type === 'text'))) {
      super._evtKeydown(event);
    }
  }

  /** What takes the focus from outside, as a notebook that is just drawn, gives it back to where the user was. */
  protected override _evtFocus(event: FocusEvent): void {
    const { target } = event;
    if (target instanceof HTMLElement && this.node.contains(target)) {
      this._focused = target;
    } else if (this._focused?.isConnected === true) {
      event.stopPropagation();
      this._focused.focus();
    } else {
      super._evtFocus(event);
    }
  }

  private _offer(): void {
    const buttons = this.node.querySelectorAll<HTMLButtonElement>(
      '.jp-Dialog-footer button:not(.jp-mod-reject)'
    );
    for (const button of buttons) {
      button.disabled = this._list.getValue() === null;
    }
  }

  private readonly _list: SnapshotTimeline;
  private _focused: HTMLElement | null = null;
}
