import type { TranslationBundle } from '@jupyterlab/translation';
import { HTMLSelect } from '@jupyterlab/ui-components';
import * as React from 'react';

import { gpuRequest, type IAmount, type IGpuKind, shortage, waitingFor } from '../model/choice';
import * as words from '../model/words';
import type { IErrorInfo, IGpus } from '../forms';
import type { ISandboxes } from '../tokens';

export interface IHardwareProps extends IAmount {
  /** The chosen request for one device; empty for CPU. */
  readonly kind: string;
  /** The machine's GPUs; null while they are being looked for. */
  readonly kinds: readonly IGpuKind[] | null;
  /** The same one by one, and who waits for one. */
  readonly found: IGpus;
  /** Why they cannot be listed. */
  readonly trouble: IErrorInfo | null;
  /** The sandbox of the notebook for which is chosen. */
  readonly own: string | null;
  readonly sandboxes: ISandboxes;
  readonly trans: TranslationBundle;
  readonly onChange: (amount: IAmount) => void;
}

/** The choice between CPU and the machine's GPUs: how many there are, how many are free, who holds the others. */
export function Hardware(props: IHardwareProps): React.JSX.Element {
  const { kind, count, parts, kinds, found, trouble, own, trans } = props;
  const chosen = kinds?.find(({ request }) => request === kind);
  const waits =
    found.queue !== null &&
    kind !== '' &&
    shortage(gpuRequest({ kind, count, parts }), kinds ?? [], own) !== null;
  const isForeign = kinds !== null && kind !== '' && chosen === undefined;
  return (
    <fieldset className="wc-Picker-group">
      <legend>{trans.__('Runs on')}</legend>
      <Kind {...props} request="" name={trans.__('CPU')} about={trans.__('no GPU')} />
      {kinds?.map(item => (
        <Kind
          {...props}
          key={item.request}
          request={item.request}
          name={item.name}
          about={trans.__('%1 VRAM', words.bytes(item.memory_bytes))}
          devices={item}
        />
      ))}
      {isForeign && (
        <Kind {...props} request={kind} name={kind} about={trans.__('as this notebook asks')} />
      )}
      {kind !== '' && parts === 1 && <Count {...props} most={chosen?.devices.length} />}
      {kind !== '' && count === 1 && found.shares > 1 && <Part {...props} />}
      <p className="wc-Picker-hint" role="status">
        {waits
          ? trans.__('Not free now: the start waits in the queue, and says its place.')
          : trouble !== null
            ? `${trans.__('The GPUs cannot be listed.')} ${words.sentence(trouble.message)} ${words.sentence(trouble.hint)}`
            : kinds === null
              ? trans.__('Looking for GPUs…')
              : kinds.length === 0 &&
                `${trans.__('This machine has no GPU.')} ${found.problem}`.trim()}
      </p>
    </fieldset>
  );
}

interface IKindProps extends IHardwareProps {
  readonly request: string;
  readonly name: string;
  readonly about: string;
  /** Absent for CPU and for what this machine does not have. */
  readonly devices?: IGpuKind;
}

function Kind(props: IKindProps): React.JSX.Element {
  const { request, name, about, devices, trans } = props;
  const held = devices === undefined ? [] : holders(devices, props);
  const waiting = devices === undefined ? 0 : waitingFor(devices, props.found.queue ?? []);
  return (
    <label className="wc-Picker-kind">
      <input
        type="radio"
        name="wc-kind"
        value={request}
        checked={props.kind === request}
        onChange={() => {
          props.onChange({ kind: request, count: 1, parts: 1 });
        }}
      />
      <span className="wc-Picker-kindName">{name}</span>
      <span className="wc-Picker-about">{about}</span>
      {devices?.simulated === true && (
        <span className="wc-Badge wc-mod-note" data-badge="simulated">
          {trans.__('simulated')}
        </span>
      )}
      {devices !== undefined && (
        <span className="wc-Picker-kindFree">
          {trans.__('%1 of %2 free', devices.free, devices.devices.length)}
        </span>
      )}
      {held.length > 0 && (
        <span className="wc-Picker-kindHeld">{trans.__('Held by %1', held.join(', '))}</span>
      )}
      {waiting > 0 && (
        <span className="wc-Picker-kindHeld">
          {trans._n('%1 waits in the queue', '%1 wait in the queue', waiting)}
        </span>
      )}
    </label>
  );
}

function Count(props: IHardwareProps & { readonly most: number | undefined }): React.JSX.Element {
  const { kind, count, parts, most, trans } = props;
  return (
    <label className="wc-Picker-field">
      <span>{trans.__('How many')}</span>
      <input
        className="jp-mod-styled"
        type="number"
        name="wc-count"
        min={1}
        max={most}
        required
        value={count}
        onChange={event => {
          const wanted = Math.max(1, Math.floor(event.target.valueAsNumber || 1));
          props.onChange({ kind, count: wanted, parts });
        }}
      />
      {most !== undefined && <span className="wc-Picker-unit">{trans.__('of %1', most)}</span>}
    </label>
  );
}

/** How much of one device, where the operator lets GPUs be shared. */
function Part({ kind, count, parts, found, trans, onChange }: IHardwareProps): React.JSX.Element {
  const most = Math.max(found.shares, parts);
  return (
    <label className="wc-Picker-field">
      <span>{trans.__('Share')}</span>
      <HTMLSelect
        name="wc-parts"
        value={String(parts)}
        options={Array.from({ length: most }, (_, at) => ({
          value: String(at + 1),
          label: at === 0 ? trans.__('all') : `1/${at + 1}`
        }))}
        onChange={event => {
          onChange({ kind, count, parts: Number(event.target.value) });
        }}
      />
    </label>
  );
}

/** Who holds devices of a kind, by notebook: "this notebook", "train.ipynb (2)". */
function holders(kind: IGpuKind, { own, sandboxes, trans }: IHardwareProps): string[] {
  const counts = new Map<string, number>();
  for (const lease of kind.devices.flatMap(({ leases }) => leases)) {
    const notebook = sandboxes.get(lease.sandbox_id)?.notebook?.split('/').pop();
    const other =
      lease.mine || lease.user === ''
        ? trans.__('another sandbox')
        : trans.__('user %1', lease.user);
    const who = lease.sandbox_id === own ? trans.__('this notebook') : (notebook ?? other);
    counts.set(who, (counts.get(who) ?? 0) + 1);
  }
  return [...counts].map(([who, n]) => (n === 1 ? who : `${who} (${n})`));
}
