import { Dialog } from '@jupyterlab/apputils';
import type { TranslationBundle } from '@jupyterlab/translation';
import { HTMLSelect, ReactWidget } from '@jupyterlab/ui-components';
import * as React from 'react';

import {
  gpuKinds,
  gpuRequest,
  parseMemory,
  shownRequest,
  type IGpuKind,
  isServed
} from '../model/choice';
import type { IGlance } from '../model/glance';
import * as words from '../model/words';
import type { IChoice, IErrorInfo, IGpu, ISandboxInfo, ISandboxes, Network } from '../tokens';
import { Badges } from './badges';

export interface IPickerOptions {
  /** The notebook's file name. */
  readonly name: string;
  /** What the notebook remembers. */
  readonly choice: IChoice;
  /** What its kernel has now. */
  readonly sandbox: ISandboxInfo | null;
  readonly glance: IGlance;
  readonly sandboxes: ISandboxes;
  readonly trans: TranslationBundle;
}

/** What the form holds; `kind` is empty for CPU. */
interface IForm {
  readonly kind: string;
  readonly count: number;
  readonly memory: string;
  readonly network: Network;
  readonly template: string;
}

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
    const body = new PickerBody(options);
    const buttons = [
      Dialog.cancelButton(),
      Dialog.okButton({
        label: trans.__('Apply and Restart'),
        ariaLabel: trans.__('Apply this choice and restart the kernel')
      })
    ];
    super({
      title: trans.__('Sandbox of %1', options.name),
      body,
      buttons,
      defaultButton: 1,
      focusNodeSelector: 'input:checked'
    });
    this.addClass('wc-Picker');
    this._body2 = body;
    this._accepting = buttons.findIndex(({ accept }) => accept);
    this._sandboxes = options.sandboxes;
  }

  override resolve(index: number = this._accepting): void {
    if (index !== this._accepting || this._checked) {
      super.resolve(index);
    } else if (!this._checking) {
      void this._check();
    }
  }

  private async _check(): Promise<void> {
    const form = this._body2;
    this._checking = true;
    form.setProblem(null, true);
    try {
      await this._sandboxes.check(form.getValue());
      this._checked = true;
    } catch (reason) {
      form.setProblem(asError(reason), false);
    }
    this._checking = false;
    if (this._checked && !this.isDisposed) {
      super.resolve(this._accepting);
    }
  }

  private readonly _body2: PickerBody;
  private readonly _accepting: number;
  private readonly _sandboxes: ISandboxes;
  private _checking = false;
  private _checked = false;
}

function asError(reason: unknown): IErrorInfo {
  return reason instanceof Error && 'hint' in reason && 'code' in reason
    ? { code: String(reason.code), message: reason.message, hint: String(reason.hint) }
    : { code: 'error', message: String(reason), hint: '' };
}

class PickerBody extends ReactWidget implements Dialog.IBodyWidget<IChoice> {
  constructor(options: IPickerOptions) {
    super();
    this.addClass('wc-Picker-body');
    this._options = options;
    const { choice, sandbox } = options;
    this._form = {
      kind: '',
      count: 1,
      memory: choice.memory_bytes === undefined ? '' : String(choice.memory_bytes / 2 ** 30),
      network: choice.network ?? sandbox?.network ?? 'none',
      template: choice.template ?? sandbox?.template?.name ?? 'default'
    };
    this._show([]);
    void this._load();
  }

  /** The choice as the form has it now. */
  getValue(): IChoice {
    const { kind, count, memory, network, template } = this._form;
    const memory_bytes = parseMemory(`${memory}GiB`);
    return {
      gpu: kind === '' ? null : gpuRequest(kind, count),
      ...(memory_bytes === null ? {} : { memory_bytes }),
      network,
      template
    };
  }

  /** Show why the choice is not possible, or that it is being checked. */
  setProblem(problem: IErrorInfo | null, checking: boolean): void {
    this._problem = problem;
    this._checking = checking;
    this.update();
  }

  protected override render(): React.JSX.Element {
    const { glance, trans } = this._options;
    return (
      <form
        className="wc-Picker-form"
        onSubmit={event => {
          event.preventDefault();
        }}
      >
        <p className="wc-Picker-now">
          <span>{trans.__('Now:')}</span> <strong>{glance.label}</strong>{' '}
          <Badges badges={glance.badges} />
        </p>
        {this._renderHardware()}
        {this._renderMemory()}
        {this._renderNetwork()}
        {this._renderTemplate()}
        <div className="wc-Picker-problem" role="alert">
          {this._problem !== null && (
            <div className="wc-Notice wc-mod-error">
              <div className="wc-Notice-text">
                <span className="wc-Notice-what">{words.sentence(this._problem.message)}</span>
                <span className="wc-Notice-cure">{words.sentence(this._problem.hint)}</span>
              </div>
            </div>
          )}
        </div>
        <p className="wc-Picker-note" role="status">
          {this._checking
            ? trans.__('Checking…')
            : trans.__(
                'The kernel restarts in place: variables are lost, the notebook remembers the choice.'
              )}
        </p>
      </form>
    );
  }

  private _renderHardware(): React.JSX.Element {
    const { trans } = this._options;
    const { kind, count } = this._form;
    const chosen = this._kinds.find(({ request }) => request === kind);
    return (
      <fieldset className="wc-Picker-group">
        <legend>{trans.__('Runs on')}</legend>
        {this._renderKind('', trans.__('CPU'), trans.__('no GPU'), null)}
        {this._kinds.map(item =>
          this._renderKind(item.request, item.name, words.bytes(item.memory_bytes), item)
        )}
        {this._loaded &&
          kind !== '' &&
          chosen === undefined &&
          this._renderKind(kind, kind, trans.__('not on this machine'), null)}
        {!this._loaded && <p className="wc-Picker-hint">{trans.__('Looking for GPUs…')}</p>}
        {this._gpuTrouble !== null && (
          <p className="wc-Picker-hint">
            {trans.__('GPUs cannot be listed: %1', words.sentence(this._gpuTrouble.message))}{' '}
            {words.sentence(this._gpuTrouble.hint)}
          </p>
        )}
        {this._loaded && this._gpuTrouble === null && this._kinds.length === 0 && (
          <p className="wc-Picker-hint">{trans.__('This machine has no GPU.')}</p>
        )}
        {kind !== '' && (
          <label className="wc-Picker-field wc-Picker-count">
            <span>{trans.__('How many')}</span>
            <input
              className="jp-mod-styled"
              type="number"
              name="wc-count"
              min={1}
              max={chosen?.devices.length}
              required
              value={count}
              onChange={event => {
                this._set({ count: Math.max(1, Math.floor(event.target.valueAsNumber || 1)) });
              }}
            />
            {chosen !== undefined && (
              <span className="wc-Picker-unit">{trans.__('of %1', chosen.devices.length)}</span>
            )}
          </label>
        )}
      </fieldset>
    );
  }

  private _renderKind(
    request: string,
    name: string,
    about: string,
    kind: IGpuKind | null
  ): React.JSX.Element {
    const { trans } = this._options;
    const holders = kind === null ? [] : this._holders(kind);
    return (
      <label key={request} className="wc-Picker-kind">
        <input
          type="radio"
          name="wc-kind"
          value={request}
          checked={this._form.kind === request}
          onChange={() => {
            this._set({ kind: request, count: 1 });
          }}
        />
        <span className="wc-Picker-kindName">{name}</span>
        <span className="wc-Picker-kindAbout">{about}</span>
        {kind?.simulated === true && (
          <span className="wc-Badge wc-mod-note" data-badge="simulated">
            {trans.__('simulated')}
          </span>
        )}
        {kind !== null && (
          <span className="wc-Picker-kindFree">
            {trans.__('%1 of %2 free', kind.free, kind.devices.length)}
          </span>
        )}
        {holders.length > 0 && (
          <span className="wc-Picker-kindHeld">{trans.__('Held by %1', holders.join(', '))}</span>
        )}
      </label>
    );
  }

  private _renderMemory(): React.JSX.Element {
    const { sandbox, trans } = this._options;
    const limit = sandbox?.limits.memory ?? null;
    return (
      <label className="wc-Picker-field">
        <span>{trans.__('Memory')}</span>
        <input
          className="jp-mod-styled"
          type="number"
          name="wc-memory"
          min={0.25}
          step="any"
          placeholder={trans.__('default')}
          value={this._form.memory}
          onChange={event => {
            this._set({ memory: event.target.value });
          }}
        />
        <span className="wc-Picker-unit">GiB</span>
        {limit?.enforced === false && (
          <span className="wc-Picker-hint">
            {trans.__('Not enforced on this machine. %1', words.sentence(limit.why))}
          </span>
        )}
      </label>
    );
  }

  private _renderNetwork(): React.JSX.Element {
    const { trans } = this._options;
    const options: { value: Network; label: string; about: string }[] = [
      { value: 'none', label: trans.__('None'), about: trans.__('the kernel reaches nothing') },
      { value: 'host', label: trans.__('Open'), about: trans.__('the machine’s own network') }
    ];
    return (
      <fieldset className="wc-Picker-group wc-mod-row">
        <legend>{trans.__('Network')}</legend>
        {options.map(({ value, label, about }) => (
          <label key={value} className="wc-Picker-option">
            <input
              type="radio"
              name="wc-network"
              value={value}
              checked={this._form.network === value}
              onChange={() => {
                this._set({ network: value });
              }}
            />
            <span>{label}</span>
            <span className="wc-Picker-kindAbout">{about}</span>
            {value === 'host' && (
              <span className="wc-Badge wc-mod-warning">{trans.__('open')}</span>
            )}
          </label>
        ))}
      </fieldset>
    );
  }

  private _renderTemplate(): React.JSX.Element {
    const { sandboxes, trans } = this._options;
    const { template } = this._form;
    const known = new Map(sandboxes.templates.map(item => [item.name, item]));
    const names = [...new Set(['default', ...known.keys(), template])];
    const modules = known.get(template)?.preload ?? [];
    return (
      <label className="wc-Picker-field">
        <span>{trans.__('Template')}</span>
        <HTMLSelect
          name="wc-template"
          value={template}
          onChange={event => {
            this._set({ template: event.target.value });
          }}
        >
          {names.map(name => (
            <option key={name} value={name}>
              {name}
            </option>
          ))}
        </HTMLSelect>
        {modules.length > 0 && (
          <span className="wc-Picker-hint">
            {trans.__('Imported in advance: %1', modules.join(', '))}
          </span>
        )}
      </label>
    );
  }

  /** Who holds devices of a kind, by notebook. */
  private _holders(kind: IGpuKind): string[] {
    const { sandbox, sandboxes, trans } = this._options;
    const counts = new Map<string, number>();
    for (const { lease } of kind.devices) {
      if (lease !== null) {
        const notebook = sandboxes.get(lease.sandbox_id)?.notebook?.split('/').pop();
        const who =
          lease.sandbox_id === sandbox?.id
            ? trans.__('this notebook')
            : (notebook ?? trans.__('another sandbox'));
        counts.set(who, (counts.get(who) ?? 0) + 1);
      }
    }
    return [...counts].map(([who, n]) => (n === 1 ? who : `${who} (${n})`));
  }

  private _set(change: Partial<IForm>): void {
    this._form = { ...this._form, ...change };
    this._problem = null;
    this.update();
  }

  private async _load(): Promise<void> {
    try {
      this._show(await this._options.sandboxes.gpus());
    } catch (reason) {
      this._gpuTrouble = asError(reason);
    }
    this._loaded = true;
    if (!this.isDisposed) {
      this.update();
    }
  }

  private _show(gpus: readonly IGpu[]): void {
    const { choice, sandbox } = this._options;
    this._kinds = gpuKinds(gpus);
    const held = sandbox !== null && isServed(choice, sandbox) ? sandbox.gpus : [];
    const shown = shownRequest(
      choice.gpu === undefined ? sandbox?.gpu : choice.gpu,
      held,
      this._kinds
    );
    this._form = { ...this._form, kind: shown?.request ?? '', count: shown?.count ?? 1 };
  }

  private readonly _options: IPickerOptions;
  private _form: IForm;
  private _kinds: IGpuKind[] = [];
  private _loaded = false;
  private _gpuTrouble: IErrorInfo | null = null;
  private _problem: IErrorInfo | null = null;
  private _checking = false;
}
