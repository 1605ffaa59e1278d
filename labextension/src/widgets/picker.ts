import { Dialog } from '@jupyterlab/apputils';

import { gpuKinds, shortage } from '../model/choice';
import * as words from '../model/words';
import type { IChoice, IErrorInfo } from '../tokens';
import { PickerForm, type IPickerOptions } from './pickerForm';

/**
 * Let the user choose what a notebook's sandbox gets.
 *
 * @returns the choice, which the server has found possible; null if the user cancelled.
 */
export async function pick(options: IPickerOptions): Promise<IChoice | null> {
  const result = await new PickerDialog(options).launch();
  return result.button.accept ? result.value : null;
}

/** A dialog that closes only with a choice that can be started. */
class PickerDialog extends Dialog<IChoice> {
  constructor(options: IPickerOptions) {
    const { trans } = options;
    const form = new PickerForm(options);
    const buttons = [
      Dialog.cancelButton(),
      Dialog.okButton({
        label: options.hasKernel ? trans.__('Apply and Restart') : trans.__('Apply and Start'),
        ariaLabel: options.hasKernel
          ? trans.__('Apply this choice and restart the kernel')
          : trans.__('Apply this choice and start a kernel')
      })
    ];
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
  }

  override resolve(index: number = this._accepting): void {
    if (index !== this._accepting) {
      super.resolve(index);
    } else if (!this._checking) {
      void this._check();
    }
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
        queue === null ? shortage(choice.gpu, gpuKinds(gpus), sandbox?.id ?? null) : null;
      return found && words.shortage(found, trans);
    } catch (reason) {
      return words.asError(reason);
    }
  }

  private readonly _form: PickerForm;
  private readonly _accepting: number;
  private readonly _options: IPickerOptions;
  private _checking = false;
}
