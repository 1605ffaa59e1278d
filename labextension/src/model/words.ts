/*
 * How things are said. Pure: everything comes in as an argument, the translator included.
 */
import type { TranslationBundle } from '@jupyterlab/translation';

import type {
  IChoice,
  IErrorInfo,
  IGpuDevice,
  ILimitStatus,
  IPhase,
  ISandboxInfo,
  IUsage,
  SandboxState,
  StartedFrom
} from '../forms';
import { type IShortage, requestName, splitRequest } from './choice';

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];

/** "80 GiB", "512 MiB". */
export function bytes(amount: number): string {
  let unit = 0;
  let value = amount;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${trimmed(value, value < 10 ? 1 : 0)} ${UNITS[unit] ?? ''}`;
}

/** A measured time: "84 ms", "1.2 s", "12 s". */
export function milliseconds(amount: number): string {
  return amount < 999.5
    ? `${Math.round(amount)} ms`
    : `${trimmed(amount / 1000, amount < 9950 ? 1 : 0)} s`;
}

/** A time that still runs, in whole seconds: "12 s", "3 min 5 s". Never negative. */
export function seconds(amount: number): string {
  const whole = Math.max(0, Math.floor(amount));
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** How long something has lasted, roughly: "12 s", "5 min", "3 h", "2 d". Never negative. */
export function age(amount_s: number, trans: TranslationBundle): string {
  const whole = Math.max(0, Math.floor(amount_s));
  if (whole < 60) {
    return trans.__('%1 s', whole);
  }
  if (whole < 3600) {
    return trans.__('%1 min', Math.floor(whole / 60));
  }
  return whole < 48 * 3600
    ? trans.__('%1 h', Math.floor(whole / 3600))
    : trans.__('%1 d', Math.floor(whole / 86400));
}

function trimmed(value: number, digits: number): string {
  return String(Number(value.toFixed(digits)));
}

/** What a sandbox computes on: "CPU", "A100-80GB", "2 × L4, T4", "1/2 T4". */
export function hardware(gpus: readonly IGpuDevice[], trans: TranslationBundle): string {
  if (gpus.length === 0) {
    return trans.__('CPU');
  }
  const counts = new Map<string, number>();
  for (const { name, parts } of gpus) {
    const short = parts > 1 ? `1/${parts} ${shortName(name)}` : shortName(name);
    counts.set(short, (counts.get(short) ?? 0) + 1);
  }
  return [...counts].map(([name, n]) => (n === 1 ? name : `${n} × ${name}`)).join(', ');
}

/** What a request asks for, in the form in which `hardware` tells what one has: "1/2 T4" of "T4/2", "2 × L4" of "L4:2". */
function asked(request: string): string {
  const { kind, count, parts } = splitRequest(request);
  return parts > 1 ? `1/${parts} ${kind}` : count > 1 ? `${count} × ${kind}` : kind;
}

/** A device's name without what only a data sheet needs: "A100-80GB" for "NVIDIA A100-SXM4-80GB". */
function shortName(deviceName: string): string {
  return requestName(deviceName).replace(/[\s-](?:SXM\d?|PCIE|HBM\d\w?)(?=[\s-]|$)/gi, '');
}

/** What a kernel has woken from that goes on where it was; null if it was started. */
export function wokeFrom({
  started_from,
  resumed_ms,
  phases_ms
}: ISandboxInfo): 'disk' | 'park' | null {
  if (resumed_ms === null) {
    return null;
  }
  if ('unpark' in phases_ms && !('restore' in phases_ms)) {
    return 'park';
  }
  return started_from === 'snapshot' ? 'disk' : null;
}

/** What ran beside its kernel and does not come back with it; empty if nothing did. */
export function notSaved({ not_saved }: ISandboxInfo, trans: TranslationBundle): string {
  return not_saved.length === 0
    ? ''
    : trans.__('What ran beside it does not come back: %1.', not_saved.join(', '));
}

/** How the kernel was started and how long it took: "template · 84 ms", "resumed · 52 ms". */
export function started(sandbox: ISandboxInfo, trans: TranslationBundle): string {
  const parts: string[] = [];
  const woke = wokeFrom(sandbox);
  if (woke !== null && sandbox.resumed_ms !== null) {
    const how = woke === 'park' ? trans.__('unparked') : trans.__('resumed');
    return `${how} · ${milliseconds(sandbox.resumed_ms)}`;
  }
  if (sandbox.started_from !== null) {
    const isFork = sandbox.started_from === 'snapshot' && sandbox.owner === 'fork';
    parts.push(isFork ? trans.__('fork') : origin(sandbox.started_from, trans));
  }
  if (sandbox.started_ms !== null) {
    parts.push(milliseconds(sandbox.started_ms));
  }
  return parts.join(' · ');
}

function origin(from: StartedFrom, trans: TranslationBundle): string {
  switch (from) {
    case 'template':
      return trans.__('template');
    case 'cold':
      return trans.__('cold start');
    case 'snapshot':
      return trans.__('snapshot');
  }
}

/** What a start is busy with: "template torch", "sandbox". */
export function phase(phase: IPhase, trans: TranslationBundle): string {
  return [phaseName(phase.name, trans), phase.detail].filter(Boolean).join(' ');
}

function phaseName(name: string, trans: TranslationBundle): string {
  switch (name) {
    case 'queue':
      return trans.__('queue');
    case 'lease':
      return trans.__('GPU');
    case 'sandbox':
      return trans.__('sandbox');
    case 'guest':
      return trans.__('guest');
    case 'template':
      return trans.__('template');
    case 'kernel':
      return trans.__('kernel');
    case 'restore':
      return trans.__('restore');
    case 'unpark':
      return trans.__('unpark');
    default:
      return name;
  }
}

export function state(state: SandboxState, trans: TranslationBundle): string {
  switch (state) {
    case 'creating':
      return trans.__('starting');
    case 'running':
      return trans.__('running');
    case 'suspending':
      return trans.__('suspending');
    case 'suspended':
      return trans.__('suspended');
    case 'resuming':
      return trans.__('resuming');
    case 'stopping':
      return trans.__('stopping');
    case 'stopped':
      return trans.__('stopped');
    case 'failed':
      return trans.__('failed');
  }
}

/** Limits that count bytes. */
const BYTES: ReadonlySet<string> = new Set(['memory', 'layer', 'shm']);

/** A limit in words: "memory 8 GiB", "processes 4096". */
export function limit(name: string, status: ILimitStatus, trans: TranslationBundle): string {
  const { value } = status;
  if (value === null) {
    return trans.__('%1: no limit', limitName(name, trans));
  }
  const amount = BYTES.has(name) ? bytes(value) : trimmed(value, 2);
  return `${limitName(name, trans)} ${amount}`;
}

function limitName(name: string, trans: TranslationBundle): string {
  switch (name) {
    case 'memory':
      return trans.__('memory');
    case 'pids':
      return trans.__('processes');
    case 'cpu':
      return trans.__('CPU cores');
    case 'layer':
      return trans.__('writable layer');
    case 'shm':
      return trans.__('shared memory');
    default:
      return name;
  }
}

/** Limits that are not enforced, those with the same reason together: "memory 8 GiB, processes 9 (no cgroup)". */
export function reasoned(
  limits: readonly (readonly [string, ILimitStatus])[],
  trans: TranslationBundle
): string[] {
  const byReason = new Map<string, string[]>();
  for (const [name, status] of limits) {
    const why = status.why.trim().replace(/\.$/, '');
    byReason.set(why, [...(byReason.get(why) ?? []), limit(name, status, trans)]);
  }
  return [...byReason].map(([why, names]) =>
    why === '' ? names.join(', ') : `${names.join(', ')} (${why})`
  );
}

/** What a sandbox uses now: "CPU 140 %", "RAM 1.2 of 8 GiB", "GPU 30 %", "VRAM 2 of 80 GiB". */
export function usage(used: IUsage, trans: TranslationBundle): string[] {
  const { cpu, memory_bytes, memory_limit_bytes, gpu_pct, vram_bytes, vram_total_bytes } = used;
  return [
    cpu === null ? '' : trans.__('CPU %1 %', Math.round(100 * cpu)),
    memory_limit_bytes === null
      ? trans.__('RAM %1', bytes(memory_bytes))
      : trans.__('RAM %1 of %2', bytes(memory_bytes), bytes(memory_limit_bytes)),
    gpu_pct === null ? '' : trans.__('GPU %1 %', Math.round(gpu_pct)),
    vram_bytes === null || vram_total_bytes === null
      ? ''
      : trans.__('VRAM %1 of %2', bytes(vram_bytes), bytes(vram_total_bytes))
  ].filter(Boolean);
}

/** What a sandbox was given besides its hardware: "network none", "memory 8 GiB". */
export function facts(sandbox: ISandboxInfo, trans: TranslationBundle): string[] {
  return [
    typeof sandbox.network !== 'string'
      ? trans.__('reaches %1', hosts(sandbox.network, trans))
      : sandbox.network === 'none'
        ? trans.__('no network')
        : trans.__('network open'),
    ...Object.entries(sandbox.limits)
      .filter(([, { value }]) => value !== null)
      .map(([name, status]) => {
        const amount = limit(name, status, trans);
        return status.enforced ? amount : trans.__('%1 (not enforced)', amount);
      })
  ];
}

/** Hosts that are reached, the first few of them. */
function hosts(names: readonly string[], trans: TranslationBundle): string {
  if (names.length === 0) {
    return trans.__('the package index');
  }
  return names.length > 3
    ? trans.__('%1 and %2 more', names.slice(0, 2).join(', '), names.length - 2)
    : names.join(', ');
}

/** What a notebook asks for: "A100:2, memory 8 GiB, open network". */
export function choice(choice: IChoice, trans: TranslationBundle): string {
  const { gpu, memory_bytes, network, template } = choice;
  return [
    gpu === undefined
      ? ''
      : gpu === null
        ? trans.__('CPU')
        : typeof gpu === 'string'
          ? asked(gpu)
          : gpu.map(asked).join(trans.__(' or ')),
    memory_bytes === undefined ? '' : trans.__('memory %1', bytes(memory_bytes)),
    network === undefined
      ? ''
      : typeof network !== 'string'
        ? trans.__('a way to %1', hosts(network, trans))
        : network === 'host'
          ? trans.__('an open network')
          : trans.__('no network'),
    template === undefined ? '' : trans.__('template %1', template)
  ]
    .filter(Boolean)
    .join(', ');
}

/** That too few devices are free, and what to do. */
export function shortage(found: IShortage, trans: TranslationBundle): IErrorInfo {
  return {
    code: 'no_gpu_available',
    message:
      found.available === 0
        ? trans.__('No %1 is free now', found.name)
        : trans.__('Only %1 × %2 can be had now, not %3', found.available, found.name, found.asked),
    hint: trans.__('Choose fewer or another kind, or shut down a notebook that holds one')
  };
}

/** Whatever was thrown, as an error to be shown. */
export function asError(reason: unknown): IErrorInfo {
  return reason instanceof Error && 'hint' in reason && 'code' in reason
    ? { code: String(reason.code), message: reason.message, hint: String(reason.hint) }
    : {
        code: 'error',
        message: reason instanceof Error ? reason.message : String(reason),
        hint: ''
      };
}

/** A sentence ends with a stop, whoever wrote it. */
export function sentence(text: string): string {
  const whole = text.trim();
  return whole === '' || /[.!?…]$/.test(whole) ? whole : `${whole}.`;
}

/** An error of the page's own connection, with its cure. */
export function trouble(error: IErrorInfo, trans: TranslationBundle): IErrorInfo {
  switch (error.code) {
    case 'absent':
      return {
        ...error,
        message: trans.__('This Jupyter server does not run the Warmcell server extension.'),
        hint: trans.__(
          'Run `jupyter server extension enable warmcell` in the server’s environment and restart it.'
        )
      };
    case 'unreachable':
      return {
        ...error,
        hint:
          error.hint ||
          trans.__('Is the Jupyter server running? The page goes on trying by itself.')
      };
    default:
      return error;
  }
}
