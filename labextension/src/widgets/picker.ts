import { Dialog } from '@jupyterlab/apputils';

import { gpuKinds, shortage } from '../model/choice';
import * as words from '../model/words';
import type { IChoice, IErrorInfo } from '../forms';
import { PickerForm, type IPickerOptions } from './pickerForm';

/** What a user has chosen. */
export interface IPicked {
  readonly choice: IChoice;
  /** The kernel is to go on with another GPU, not to be restarted. */
  readonly keeps: boolean;
}

/**
 * Let the user choose what a notebook's sandbox gets.
 *
 * @returns the choice, which the server has found possible; null if the user cancelled.
 */
export async function pick(options: IPickerOptions): Promise<IPicked | null> {
  const dialog = new PickerDialog(options);
  const result = await dialog.launch();
  return result.button.accept && result.value !== null
    ? { choice: result.value, keeps: dialog.keeps }
    : null;
}

/** A dialog that closes only with a choice that can be started. */
class PickerDialog extends Dialog<IChoice> {
  constructor(options: IPickerOptions) {
    const { trans } = options;
    const form = new PickerForm(options);
    const buttons = [Dialog.cancelButton(), Dialog.okButton(applyLabels(options, form.keeps))];
    super({
      title: trans.__('Sandbox of %1', options.name),
      body: form,
      buttons,
      defaultButton: 1,
      focusNodeSelector: 'input:checked'
    });
    this.addClass('wc-Picker');
    this._form = form;
    this._accepting = buttons.findIndex(({ accept }) => accept);
    this._options = options;
    form.chosen.connect(this._onChosen, this);
  }

  /** Whether the kernel is to go on with another GPU. */
  get keeps(): boolean {
    return this._keeps;
  }

  override resolve(index: number = this._accepting): void {
    if (index !== this._accepting) {
      super.resolve(index);
    } else if (!this._checking) {
      void this._check();
    }
  }

  /** What the button does depends on what is chosen. */
  private _onChosen(): void {
    const { label, ariaLabel } = applyLabels(this._options, this._form.keeps);
    const button = this.node.querySelector('.jp-Dialog-button.jp-mod-accept');
    button?.setAttribute('aria-label', ariaLabel);
    button?.querySelector('.jp-Dialog-buttonLabel')?.replaceChildren(label);
  }

  private async _check(): Promise<void> {
    this._checking = true;
    this._form.setProblem(null, true);
    const problem = await this._problem(this._form.getValue());
    this._checking = false;
    if (this.isDisposed) {
      return;
    }
    if (problem === null) {
      this._keeps = this._form.keeps;
      super.resolve(this._accepting);
    } else {
      this._form.setProblem(problem, false);
    }
  }

  /** Why a choice cannot be started, as the server says it; null if it can. */
  private async _problem(choice: IChoice): Promise<IErrorInfo | null> {
    const { sandbox, sandboxes, trans } = this._options;
    try {
      await sandboxes.check(choice);
      const { gpus, queue } = await sandboxes.gpus();
      // A restart ends this kernel before it asks for GPUs, so that none is free is said now, unless it would wait for one.
      const found =
        queue === null && !this._form.keeps
          ? shortage(choice.gpu, gpuKinds(gpus), sandbox?.id ?? null)
          : null;
      return found && words.shortage(found, trans);
    } catch (reason) {
      return words.asError(reason);
    }
  }

  private readonly _form: PickerForm;
  private readonly _accepting: number;
  private readonly _options: IPickerOptions;
  private _checking = false;
  private _keeps = false;
}

function applyLabels(
  { hasKernel, trans }: IPickerOptions,
  keeps: boolean
): { label: string; ariaLabel: string } {
  if (!hasKernel) {
    return {
      label: trans.__('Apply and Start'),
      ariaLabel: trans.__('Apply this choice and start a kernel')
    };
  }
  return keeps
    ? {
        label: trans.__('Apply'),
        ariaLabel: trans.__('Apply this choice and keep the variables')
      }
    : {
        label: trans.__('Apply and Restart'),
        ariaLabel: trans.__('Apply this choice and restart the kernel')
      };
}
