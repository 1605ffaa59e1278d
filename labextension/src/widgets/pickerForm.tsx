import type { Dialog } from '@jupyterlab/apputils';
import type { TranslationBundle } from '@jupyterlab/translation';
import { HTMLSelect, ReactWidget } from '@jupyterlab/ui-components';
import { type ISignal, Signal } from '@lumino/signaling';
import * as React from 'react';

import {
  gpuKinds,
  gpuRequest,
  type IAmount,
  type IGpuKind,
  isOtherGpu,
  isServed,
  parseHosts,
  parseMemory,
  shownRequest
} from '../model/choice';
import type { IGlance } from '../model/glance';
import { isAlive } from '../model/state';
import * as words from '../model/words';
import type { IChoice, IErrorInfo, IGpus, ISandboxInfo } from '../forms';
import type { ISandboxes } from '../tokens';
import { Badges } from './badges';
import { Hardware } from './pickerHardware';
import { Prose } from './prose';
import { Waterfall } from './waterfall';

const GIB = 2 ** 30;

const NOTHING: IGpus = { gpus: [], queue: null, shares: 1, problem: '' };

const CPU: IAmount = { kind: '', count: 1, parts: 1 };

export interface IPickerOptions {
  /** The notebook's file name. */
  readonly name: string;
  /** What the notebook remembers. */
  readonly choice: IChoice;
  /** Whether it has a kernel that can be restarted. */
  readonly hasKernel: boolean;
  /** What its kernel has now. */
  readonly sandbox: ISandboxInfo | null;
  readonly glance: IGlance;
  readonly sandboxes: ISandboxes;
  readonly trans: TranslationBundle;
}

/** What the form holds. */
interface IForm extends IAmount {
  /** Request for one device; empty for CPU. */
  readonly kind: string;
  /** In GiB; empty for the default. */
  readonly memory: string;
  readonly network: 'none' | 'host' | 'hosts';
  /** As somebody types them. */
  readonly hosts: string;
  readonly template: string;
  /** Where a kernel can go on with another GPU: that it does. */
  readonly keep: boolean;
}

/**
 * The form of the picker: hardware, memory, network and template.
 */
export class PickerForm extends ReactWidget implements Dialog.IBodyWidget<IChoice> {
  constructor(options: IPickerOptions) {
    super();
    this._options = options;
    const { choice, sandbox } = options;
    const network = choice.network ?? sandbox?.network ?? 'none';
    this._form = {
      kind: '',
      count: 1,
      parts: 1,
      memory: choice.memory_bytes === undefined ? '' : String(choice.memory_bytes / GIB),
      network: typeof network === 'string' ? network : 'hosts',
      hosts: typeof network === 'string' ? '' : network.join(', '),
      template: choice.template ?? sandbox?.template?.name ?? 'default',
      keep: true
    };
    this._isPolicy = choice.network === undefined && typeof network !== 'string';
    this._showGpus(NOTHING);
    this._kinds = null;
    void this._load();
  }

  /** The choice as the form has it now. */
  getValue(): IChoice {
    const { kind, count, parts, memory, network, template } = this._form;
    const hosts = parseHosts(this._form.hosts);
    const memory_bytes = parseMemory(`${memory}GiB`);
    return {
      gpu: kind === '' ? null : gpuRequest({ kind, count, parts }),
      ...(memory_bytes === null ? {} : { memory_bytes }),
      ...(this._isPolicy
        ? {}
        : { network: network !== 'hosts' ? network : hosts.length > 0 ? hosts : 'none' }),
      template
    };
  }

  /** Whether the kernel goes on with the other GPU that was chosen, instead of a restart. */
  get keeps(): boolean {
    return this._form.keep && this._canKeep();
  }

  /** Emitted when something was chosen. */
  get chosen(): ISignal<this, void> {
    return this._chosen;
  }

  /** Show why the choice is not possible, or that it is being checked. */
  setProblem(problem: IErrorInfo | null, checking: boolean): void {
    this._problem = problem;
    this._checking = checking;
    this.update();
  }

  protected override render(): React.JSX.Element {
    const { sandbox, sandboxes, trans } = this._options;
    return (
      <form
        className="wc-Picker-form"
        onSubmit={event => {
          event.preventDefault();
        }}
      >
        {this._renderNow()}
        <Hardware
          kind={this._form.kind}
          count={this._form.count}
          parts={this._form.parts}
          kinds={this._kinds}
          found={this._found}
          trouble={this._gpuTrouble}
          own={sandbox?.id ?? null}
          sandboxes={sandboxes}
          trans={trans}
          onChange={amount => {
            this._set(amount);
          }}
        />
        {this._renderMemory()}
        {this._renderNetwork()}
        {this._renderTemplate()}
        {this._canKeep() && this._renderKeep()}
        {this._renderProblem()}
        <p className="wc-Picker-note" role="status">
          {this._checking
            ? trans.__('Checking…')
            : this.keeps
              ? trans.__(
                  'The kernel goes on with the other GPU. The notebook remembers the choice.'
                )
              : this._options.hasKernel
                ? trans.__(
                    'The kernel restarts in place: variables are lost. The notebook remembers the choice.'
                  )
                : trans.__('The notebook remembers the choice and is saved, then a kernel starts.')}
        </p>
      </form>
    );
  }

  private _renderNow(): React.JSX.Element {
    const { glance, sandbox, trans } = this._options;
    const facts = sandbox !== null && isAlive(sandbox) ? words.facts(sandbox, trans) : [];
    return (
      <div className="wc-Picker-now">
        {glance.kind !== 'hidden' && (
          <p>
            {trans.__('Now:')} <strong>{glance.label}</strong> <Badges badges={glance.badges} />
          </p>
        )}
        {facts.length > 0 && <p>{facts.join(' · ')}</p>}
        {sandbox?.state === 'running' && <Waterfall phases_ms={sandbox.phases_ms} trans={trans} />}
      </div>
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
    const options: { value: IForm['network']; label: string; about: string }[] = [
      { value: 'none', label: trans.__('None'), about: trans.__('the kernel reaches nothing') },
      { value: 'hosts', label: trans.__('Some hosts'), about: trans.__('those that you name') },
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
            <span className="wc-Picker-about">{about}</span>
          </label>
        ))}
        {this._form.network === 'hosts' && (
          <input
            type="text"
            className="wc-Picker-hosts jp-mod-styled"
            aria-label={trans.__('Hosts that the kernel reaches')}
            placeholder="pypi.org, files.pythonhosted.org, *.example.com"
            value={this._form.hosts}
            onChange={event => {
              this._set({ hosts: event.target.value });
            }}
          />
        )}
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
          options={names}
          onChange={event => {
            this._set({ template: event.target.value });
          }}
        />
        {modules.length > 0 && (
          <span className="wc-Picker-hint">
            {trans.__('Imported in advance: %1', modules.join(', '))}
          </span>
        )}
      </label>
    );
  }

  private _renderKeep(): React.JSX.Element {
    const { trans } = this._options;
    return (
      <label className="wc-Picker-option wc-Picker-keep">
        <input
          type="checkbox"
          name="wc-keep"
          checked={this._form.keep}
          onChange={event => {
            this._set({ keep: event.target.checked });
          }}
        />
        <span>{trans.__('Keep its variables')}</span>
        <span className="wc-Picker-about">
          {trans.__('and what is on the GPU, to one of its kind')}
        </span>
      </label>
    );
  }

  /** Whether a kernel lives that would only need another GPU. */
  private _canKeep(): boolean {
    const { hasKernel, sandbox } = this._options;
    return (
      hasKernel &&
      (sandbox?.state === 'running' || sandbox?.state === 'suspended') &&
      isOtherGpu(this.getValue(), sandbox)
    );
  }

  private _renderProblem(): React.JSX.Element {
    return (
      <div className="wc-Picker-problem" role="alert">
        {this._problem !== null && (
          <div className="wc-Notice wc-mod-error">
            <div className="wc-Notice-text">
              <span className="wc-Notice-what">
                <Prose text={words.sentence(this._problem.message)} />
              </span>
              <span className="wc-Notice-cure">
                <Prose text={words.sentence(this._problem.hint)} />
              </span>
            </div>
          </div>
        )}
      </div>
    );
  }

  private _set(change: Partial<IForm>): void {
    this._isPolicy &&= change.network === undefined && change.hosts === undefined;
    this._form = { ...this._form, ...change };
    this._problem = null;
    this.update();
    this._chosen.emit();
  }

  private async _load(): Promise<void> {
    let found = NOTHING;
    try {
      found = await this._options.sandboxes.gpus();
    } catch (reason) {
      this._gpuTrouble = words.asError(reason);
    }
    if (!this.isDisposed) {
      this._showGpus(found);
      this.update();
      this._chosen.emit();
    }
  }

  /** Show these devices, and the one that is asked for or held as chosen. */
  private _showGpus(found: IGpus): void {
    const { choice, sandbox } = this._options;
    const kinds = gpuKinds(found.gpus);
    const held = sandbox !== null && isServed(choice, sandbox) ? sandbox.gpus : [];
    const asked = choice.gpu === undefined ? sandbox?.gpu : choice.gpu;
    const shown = shownRequest(asked, held, kinds);
    this._form = { ...this._form, ...(shown ?? CPU) };
    this._kinds = kinds;
    this._found = found;
  }

  private readonly _options: IPickerOptions;
  private readonly _chosen = new Signal<this, void>(this);
  private _form: IForm;
  private _found: IGpus = NOTHING;
  private _kinds: readonly IGpuKind[] | null = null;
  /** The kernelspec says which hosts are reached, and perhaps more than can be shown here: it stays so. */
  private _isPolicy: boolean;
  private _gpuTrouble: IErrorInfo | null = null;
  private _problem: IErrorInfo | null = null;
  private _checking = false;
}
