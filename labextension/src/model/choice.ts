/*
 * What a notebook asks for, as its metadata remembers it:
 *
 *     "warmcell": {"gpu": "A100:2", "memory": "8GiB", "network": "none", "template": "default"}
 *
 * `network` may be a list of hosts. `gpu` is null for CPU; a key that is absent leaves that to the kernelspec.
 */
import type { PartialJSONObject } from '@lumino/coreutils';

import type { IChoice, IGpu, IGpuDevice, ILease, ISandboxInfo, IWaiting, Network } from '../forms';

export const METADATA_KEY = 'warmcell';

const GIB = 2 ** 30;

/** The devices of one name, and how many of them nobody holds. */
export interface IGpuKind {
  readonly name: string;
  /** The request that stands for one of them. */
  readonly request: string;
  readonly memory_bytes: number;
  readonly simulated: boolean;
  readonly devices: readonly IGpu[];
  readonly free: number;
}

/** Read what a notebook's metadata asks for; what cannot be understood is left out. */
export function readChoice(metadata: unknown): IChoice {
  if (typeof metadata !== 'object' || metadata === null || Array.isArray(metadata)) {
    return {};
  }
  const { gpu, memory, network, template } = metadata as Record<string, unknown>;
  const memory_bytes = typeof memory === 'string' ? parseMemory(memory) : null;
  return {
    ...(isGpuRequest(gpu) ? { gpu } : {}),
    ...(memory_bytes === null ? {} : { memory_bytes }),
    ...(isNetwork(network) ? { network } : {}),
    ...(typeof template === 'string' && template !== '' ? { template } : {})
  };
}

function isNetwork(value: unknown): value is Network {
  return value === 'none' || value === 'host' || (isHosts(value) && value.length > 0);
}

function isHosts(value: unknown): value is string[] {
  return Array.isArray(value) && value.every(item => typeof item === 'string' && item !== '');
}

/** The hosts that somebody has typed: "pypi.org, *.example.com". */
export function parseHosts(text: string): string[] {
  return [...new Set(text.split(/[\s,;]+/).filter(Boolean))];
}

function isGpuRequest(value: unknown): value is string | string[] | null {
  return (
    value === null ||
    (typeof value === 'string' && value !== '') ||
    (Array.isArray(value) && value.length > 0 && value.every(item => typeof item === 'string'))
  );
}

/** The form in which a notebook remembers a choice. */
export function writeChoice(choice: IChoice): PartialJSONObject {
  const { gpu, memory_bytes, network, template } = choice;
  return {
    ...(gpu === undefined ? {} : { gpu: isList(gpu) ? [...gpu] : gpu }),
    ...(memory_bytes === undefined ? {} : { memory: formatMemory(memory_bytes) }),
    ...(network === undefined ? {} : { network: isList(network) ? [...network] : network }),
    ...(template === undefined ? {} : { template })
  };
}

/** Bytes of "8GiB", "512 MiB" or "1.5g"; null if it is no amount. */
export function parseMemory(text: string): number | null {
  const found = /^\s*(\d+(?:\.\d+)?)\s*([kmgt])?(?:i?b)?\s*$/i.exec(text);
  const power = ['', 'k', 'm', 'g', 't'].indexOf((found?.[2] ?? '').toLowerCase());
  const bytes = Math.round(Number(found?.[1] ?? 0) * 1024 ** power);
  return bytes > 0 ? bytes : null;
}

function formatMemory(bytes: number): string {
  return bytes % GIB === 0 ? `${bytes / GIB}GiB` : `${Math.round(bytes / 2 ** 20)}MiB`;
}

/** The GPUs of a machine by kind, those with most memory first. */
export function gpuKinds(gpus: readonly IGpu[]): IGpuKind[] {
  const kinds = new Map<string, IGpu[]>();
  for (const gpu of gpus) {
    const key = `${gpu.name}\n${gpu.memory_total_bytes}\n${gpu.simulated}`;
    kinds.set(key, [...(kinds.get(key) ?? []), gpu]);
  }
  return [...kinds.values()]
    .flatMap(devices => {
      const [first] = devices;
      return first === undefined
        ? []
        : [
            {
              name: first.name,
              request: requestName(first.name),
              memory_bytes: first.memory_total_bytes,
              simulated: first.simulated,
              devices,
              free: devices.filter(({ lease, lost }) => lease === null && !lost).length
            }
          ];
    })
    .sort((one, other) => other.memory_bytes - one.memory_bytes);
}

/** How many of those that wait could be served by a kind. */
export function waitingFor(kind: IGpuKind, queue: readonly IWaiting[]): number {
  return queue.filter(({ request }) => request.split(',').some(one => couldServe(kind, one)))
    .length;
}

/** Whether a kind is one that a request such as "A100-80GB:2", "24GiB" or "any" may mean. */
function couldServe({ name, memory_bytes }: IGpuKind, request: string): boolean {
  const asked = splitRequest(request).kind.toLowerCase();
  const least = /^(\d+(?:\.\d+)?)\s*gi?b$/.exec(asked);
  if (least !== null) {
    // As on the card's box, which rounds up.
    return memory_bytes >= 0.92 * Number(least[1]) * GIB;
  }
  return asked === 'any' || asked.split(/[\s_-]+/).every(word => name.toLowerCase().includes(word));
}

/** A device's name in the words that a request may have. */
export function requestName(deviceName: string): string {
  return deviceName
    .replace(/^NVIDIA\s+/i, '')
    .replace(/[^A-Za-z0-9 ._+-]+/g, ' ')
    .trim();
}

/** How much of a kind is asked for: whole devices, or one of so many shares of one. */
export interface IAmount {
  readonly kind: string;
  readonly count: number;
  readonly parts: number;
}

/** The request for that. */
export function gpuRequest({ kind, count, parts }: IAmount): string {
  return parts > 1 ? `${kind}/${parts}` : count > 1 ? `${kind}:${count}` : kind;
}

/** What a request such as "A100:2" or "A100/2" is for. */
export function splitRequest(request: string): IAmount {
  const found = /^(.*?)\s*([:/])\s*(\d+)$/.exec(request.trim());
  const number = Math.max(1, Number(found?.[3] ?? 1));
  return {
    kind: found === null ? request.trim() : (found[1] ?? ''),
    count: found?.[2] === ':' ? number : 1,
    parts: found?.[2] === '/' ? number : 1
  };
}

/**
 * The kind and count that a picker shows for a request.
 *
 * Somebody who asked for "A100" or "any" sees the kind that they hold, somebody who asked for what is not here sees
 * their own words.
 *
 * @returns null for CPU
 */
export function shownRequest(
  gpu: string | readonly string[] | null | undefined,
  held: readonly IGpuDevice[],
  kinds: readonly IGpuKind[]
): IAmount | null {
  if (gpu === null || gpu === undefined || gpu.length === 0) {
    return null;
  }
  const [holds] = held;
  if (holds !== undefined) {
    return { kind: requestName(holds.name), count: held.length, parts: holds.parts };
  }
  if (isList(gpu)) {
    return { kind: gpu.join(', '), count: 1, parts: 1 };
  }
  const { kind, count, parts } = splitRequest(gpu);
  const known = kinds.find(({ request }) => request.toLowerCase() === kind.toLowerCase());
  return { kind: known?.request ?? kind, count, parts };
}

/** More devices were asked for than can be had now. */
export interface IShortage {
  readonly name: string;
  readonly asked: number;
  /** Those that are free or held by who asks. */
  readonly available: number;
}

/**
 * Whether enough devices are free for a request by the holder of sandbox `own`; null if so, or if it cannot be told.
 */
export function shortage(
  gpu: IChoice['gpu'],
  kinds: readonly IGpuKind[],
  own: string | null
): IShortage | null {
  if (typeof gpu !== 'string') {
    return null;
  }
  const { kind, count: asked, parts } = splitRequest(gpu);
  const found = kinds.find(({ request }) => request === kind);
  if (found === undefined) {
    return null;
  }
  const available = found.devices.filter(
    ({ lease, leases }) =>
      lease === null || lease.sandbox_id === own || hasShare(leases, parts, own)
  ).length;
  return asked <= available ? null : { name: found.name, asked, available };
}

/** Whether one of so many shares of a device is free, or the own one. */
function hasShare(leases: readonly ILease[], parts: number, own: string | null): boolean {
  const others = leases.filter(({ sandbox_id }) => sandbox_id !== own);
  return parts > 1 && others.length < parts && others.every(lease => lease.parts === parts);
}

/** What of a choice a sandbox does not have, as far as the page can tell; empty if it serves the choice. */
export function missing(choice: IChoice, sandbox: ISandboxInfo): IChoice {
  const { gpu, memory_bytes, network, template } = choice;
  const has = sandbox.limits.memory?.value ?? null;
  return {
    ...(gpu === undefined || sameRequest(gpu, sandbox) ? {} : { gpu }),
    ...(memory_bytes === undefined || memory_bytes === has ? {} : { memory_bytes }),
    ...(network === undefined || networkKey(network) === networkKey(sandbox.network)
      ? {}
      : { network }),
    ...(template === undefined || template === (sandbox.template?.name ?? template)
      ? {}
      : { template })
  };
}

/** Whether a sandbox already is what a notebook asks for. */
export function isServed(choice: IChoice, sandbox: ISandboxInfo): boolean {
  return Object.keys(missing(choice, sandbox)).length === 0;
}

/** Whether a kernel that lives would serve a choice, had it another GPU. */
export function isOtherGpu(choice: IChoice, sandbox: ISandboxInfo): boolean {
  return Object.keys(missing(choice, sandbox)).join() === 'gpu';
}

function sameRequest(asked: string | readonly string[] | null, sandbox: ISandboxInfo): boolean {
  if (asked === null) {
    return sandbox.gpus.length === 0;
  }
  const key = requestKey(asked);
  return key === requestKey(sandbox.gpu ?? '') || key === heldKey(sandbox.gpus);
}

/** What it has, as a request for just that; null where it has several kinds, or none. */
function heldKey(held: readonly IGpuDevice[]): string | null {
  const [first] = held;
  return first === undefined || held.some(({ name }) => name !== first.name)
    ? null
    : requestKey(
        gpuRequest({ kind: requestName(first.name), count: held.length, parts: first.parts })
      );
}

function networkKey(network: Network): string {
  return isList(network) ? `hosts ${[...network].sort().join(' ')}` : network;
}

function requestKey(request: string | readonly string[]): string {
  return (isList(request) ? request : [request])
    .map(item => {
      const { kind, ...amount } = splitRequest(item);
      return gpuRequest({ kind: kind.toLowerCase().replace(/[\s_-]+/g, '-'), ...amount });
    })
    .join(',');
}

function isList(value: string | readonly string[] | null): value is readonly string[] {
  return Array.isArray(value);
}
