/*
 * From JSON to typed forms. What an older or newer server leaves out gets a harmless default; what it adds is ignored.
 */
import type {
  IErrorInfo,
  IGpu,
  IGpuDevice,
  IGpus,
  ILease,
  ILimitStatus,
  IMeters,
  IParked,
  IPhase,
  IQueued,
  ISandboxInfo,
  ISnapshotInfo,
  ISnapshots,
  ITemplateInfo,
  ITemplateStatus,
  IUsage,
  IWaiting,
  Network,
  SandboxState,
  ServerEvent,
  StartedFrom
} from './forms';

export type Fields = Readonly<Record<string, unknown>>;

/** Where a port is seen: a path after the server's URL, or after a host of its own. */
export function readPort(value: unknown): { readonly path: string; readonly host: string | null } {
  const { path, host } = fields(value, 'the port');
  return { path: text(path), host: textOrNull(host) };
}

/** The server answered something that is not of the protocol. */
export class WireError extends Error {}

const STATES: readonly SandboxState[] = [
  'creating',
  'running',
  'suspending',
  'suspended',
  'resuming',
  'stopping',
  'stopped',
  'failed'
];

const STARTED_FROM: readonly StartedFrom[] = ['template', 'cold', 'snapshot'];

const TEMPLATE_STATES: readonly ITemplateStatus['state'][] = [
  'none',
  'importing',
  'ready',
  'failed'
];

export function isFields(value: unknown): value is Fields {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function fields(value: unknown, what: string): Fields {
  if (!isFields(value)) {
    throw new WireError(`${what} is not an object`);
  }
  return value;
}

export function text(value: unknown, fallback = ''): string {
  return typeof value === 'string' ? value : fallback;
}

function textOrNull(value: unknown): string | null {
  return typeof value === 'string' ? value : null;
}

export function number(value: unknown, fallback = 0): number {
  return typeof value === 'number' && Number.isFinite(value) ? value : fallback;
}

function numberOrNull(value: unknown): number | null {
  return typeof value === 'number' && Number.isFinite(value) ? value : null;
}

export function list(value: unknown): readonly unknown[] {
  return Array.isArray(value) ? (value as readonly unknown[]) : [];
}

function texts(value: unknown): string[] {
  return list(value).filter(item => typeof item === 'string');
}

function textMap(value: unknown): Record<string, string> {
  return isFields(value)
    ? Object.fromEntries(Object.entries(value).map(([key, item]) => [key, text(item)]))
    : {};
}

function numberMap(value: unknown): Record<string, number> {
  return isFields(value)
    ? Object.fromEntries(Object.entries(value).map(([key, item]) => [key, number(item)]))
    : {};
}

function oneOf<T extends string>(value: unknown, allowed: readonly T[], fallback: T): T {
  return allowed.find(item => item === value) ?? fallback;
}

function maybe<T>(value: unknown, read: (value: unknown) => T): T | null {
  return value === null || value === undefined ? null : read(value);
}

export function readError(value: unknown): IErrorInfo {
  const data = isFields(value) ? value : {};
  return {
    code: text(data.code, 'error'),
    message: text(data.message),
    hint: text(data.hint)
  };
}

function readPhase(value: unknown): IPhase {
  const data = fields(value, 'phase');
  return {
    name: text(data.name),
    since: number(data.since),
    detail: text(data.detail),
    hint: text(data.hint)
  };
}

function readLimit(value: unknown): ILimitStatus {
  const data = fields(value, 'limit');
  return {
    value: numberOrNull(data.value),
    enforced: data.enforced === true,
    why: text(data.why)
  };
}

function readTemplateStatus(value: unknown): ITemplateStatus {
  const data = fields(value, 'template status');
  return {
    name: text(data.name),
    state: oneOf(data.state, TEMPLATE_STATES, 'none'),
    importing: text(data.importing),
    since: number(data.since),
    imported: texts(data.imported),
    failed: textMap(data.failed)
  };
}

export function readTemplate(value: unknown): ITemplateInfo {
  const data = fields(value, 'template');
  return {
    name: text(data.name),
    python: text(data.python),
    preload: texts(data.preload),
    status: readTemplateStatus(data.status ?? {}),
    prepared: number(data.prepared)
  };
}

function readDevice(value: unknown): IGpuDevice {
  const data = fields(value, 'GPU');
  return {
    uuid: text(data.uuid),
    index: number(data.index),
    name: text(data.name),
    memory_total_bytes: number(data.memory_total_bytes),
    simulated: data.simulated === true,
    parts: number(data.parts, 1)
  };
}

function readLease(value: unknown): ILease {
  const data = fields(value, 'lease');
  return {
    sandbox_id: text(data.sandbox_id),
    since: number(data.since),
    mine: data.mine !== false,
    user: text(data.user),
    parts: number(data.parts, 1)
  };
}

export function readGpu(value: unknown): IGpu {
  const data = fields(value, 'GPU');
  const lease = maybe(data.lease, readLease);
  const whole = lease === null ? [] : [lease];
  return {
    ...readDevice(data),
    lease,
    leases: Array.isArray(data.leases) ? list(data.leases).map(readLease) : whole,
    lost: data.lost === true
  };
}

function readWaiting(value: unknown): IWaiting {
  const data = fields(value, 'a place in the queue');
  return {
    sandbox_id: text(data.sandbox_id),
    request: text(data.request),
    place: number(data.place)
  };
}

export function readGpus(value: unknown): IGpus {
  const data = fields(value, 'the GPUs');
  return {
    gpus: list(data.gpus).map(readGpu),
    queue: Array.isArray(data.queue) ? list(data.queue).map(readWaiting) : null,
    shares: number(data.shares, 1),
    problem: text(data.problem)
  };
}

function readQueued(value: unknown): IQueued {
  const data = fields(value, 'queue');
  return {
    request: text(data.request),
    place: number(data.place, 1),
    length: number(data.length, 1),
    since: number(data.since),
    estimate_s: numberOrNull(data.estimate_s),
    why: text(data.why)
  };
}

function readParked(value: unknown): IParked {
  const data = fields(value, 'what is parked');
  return {
    since: number(data.since),
    vram_bytes: number(data.vram_bytes),
    stays_bytes: number(data.stays_bytes)
  };
}

function readUsage(value: unknown): IUsage {
  const data = fields(value, 'usage');
  return {
    cpu: numberOrNull(data.cpu),
    memory_bytes: number(data.memory_bytes),
    memory_limit_bytes: numberOrNull(data.memory_limit_bytes),
    busy: data.busy === true,
    idle_s: numberOrNull(data.idle_s),
    gpu_pct: numberOrNull(data.gpu_pct),
    vram_bytes: numberOrNull(data.vram_bytes),
    vram_total_bytes: numberOrNull(data.vram_total_bytes)
  };
}

export function readMeters(value: unknown): IMeters {
  const data = fields(value, 'the meters');
  const machine = isFields(data.machine) ? data.machine : {};
  const sandboxes = isFields(data.sandboxes) ? Object.entries(data.sandboxes) : [];
  return {
    at: number(data.at),
    sandboxes: new Map(sandboxes.map(([id, usage]) => [id, readUsage(usage)])),
    machine: {
      cpus: number(machine.cpus, 1),
      cpu: numberOrNull(machine.cpu),
      memory_bytes: number(machine.memory_bytes),
      memory_total_bytes: number(machine.memory_total_bytes),
      gpus: list(machine.gpus).map(item => {
        const gpu = fields(item, 'GPU');
        return {
          ...readDevice(gpu),
          memory_used_bytes: numberOrNull(gpu.memory_used_bytes),
          utilization_pct: numberOrNull(gpu.utilization_pct)
        };
      })
    }
  };
}

function readGpuRequest(value: unknown): string | readonly string[] | null {
  return Array.isArray(value) ? texts(value) : textOrNull(value);
}

export function readSandbox(value: unknown): ISandboxInfo {
  const data = fields(value, 'sandbox');
  const id = text(data.id);
  if (!id) {
    throw new WireError('a sandbox has no id');
  }
  const limits = isFields(data.limits) ? Object.entries(data.limits) : [];
  return {
    id,
    state: oneOf(data.state, STATES, 'failed'),
    backend: text(data.backend),
    isolated: data.isolated === true,
    owner: text(data.owner),
    parent: textOrNull(data.parent),
    kernel_id: textOrNull(data.kernel_id),
    notebook: textOrNull(data.notebook),
    workspace_note: text(data.workspace_note),
    network: readNetwork(data.network, data.egress),
    gpu: readGpuRequest(data.gpu),
    gpus: list(data.gpus).map(readDevice),
    limits: Object.fromEntries(limits.map(([name, limit]) => [name, readLimit(limit)])),
    template: maybe(data.template, readTemplateStatus),
    started_from: maybe(data.started_from, item => oneOf(item, STARTED_FROM, 'cold')),
    started_ms: numberOrNull(data.started_ms),
    generation: number(data.generation),
    phase: maybe(data.phase, readPhase),
    created_at: number(data.created_at),
    error: maybe(data.error, readError),
    previous_error: maybe(data.previous_error, readError),
    resumed_ms: numberOrNull(data.resumed_ms),
    not_saved: list(data.not_saved).map(item => text(item)),
    phases_ms: numberMap(data.phases_ms),
    snapshot: textOrNull(data.snapshot),
    queue: maybe(data.queue, readQueued),
    parked: maybe(data.parked, readParked)
  };
}

/** What a sandbox reaches. A policy without hosts is one that reaches the package index alone. */
function readNetwork(network: unknown, egress: unknown): Network {
  if (isFields(egress)) {
    const added = isFields(egress.headers) ? Object.keys(egress.headers) : [];
    return [...list(egress.allow).map(host => text(host)), ...added].filter(Boolean);
  }
  return oneOf<'none' | 'host'>(network, ['none', 'host'], 'host');
}

export function readSnapshot(value: unknown): ISnapshotInfo {
  const data = fields(value, 'snapshot');
  const id = text(data.id);
  if (!id) {
    throw new WireError('a snapshot has no id');
  }
  return {
    id,
    name: text(data.name),
    kind: text(data.kind),
    kernel_id: textOrNull(data.kernel_id),
    parent: textOrNull(data.parent),
    cell: numberOrNull(data.cell),
    created_at: number(data.created_at),
    image_bytes: number(data.image_bytes),
    layer_bytes: number(data.layer_bytes),
    compressed: data.compressed === true || data.image_compressed === true,
    memory_bytes: number(data.memory_bytes)
  };
}

export function readSnapshots(value: unknown): ISnapshots {
  return {
    snapshots: readList(value, 'snapshots', readSnapshot),
    imports: isFields(value) && value.imports === true
  };
}

/** The list `key` of an answer such as `{"sandboxes": […]}`. */
export function readList<T>(value: unknown, key: string, read: (item: unknown) => T): T[] {
  return list(fields(value, 'the answer')[key]).map(read);
}

/**
 * Read one server-sent event; null for kinds that this page does not know.
 *
 * @throws {@link WireError} or SyntaxError if its data is not of the protocol.
 */
export function readEvent(kind: string, data: string): ServerEvent | null {
  switch (kind) {
    case 'hello': {
      const hello = fields(JSON.parse(data), 'hello');
      return {
        kind: 'hello',
        sandboxes: readList(hello, 'sandboxes', readSandbox),
        templates: readList(hello, 'templates', readTemplate),
        version: textOrNull(hello.version)
      };
    }
    case 'sandbox':
      return { kind: 'sandbox', sandbox: readSandbox(JSON.parse(data)) };
    case 'template':
      return { kind: 'template', template: readTemplate(JSON.parse(data)) };
    default:
      return null;
  }
}
