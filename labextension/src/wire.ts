/*
 * From JSON to typed forms. What an older or newer server leaves out gets a harmless default; what it adds is ignored.
 */
import type {
  IErrorInfo,
  IGpu,
  IGpuDevice,
  ILease,
  ILimitStatus,
  IPhase,
  ISandboxInfo,
  ISnapshotInfo,
  ISnapshots,
  ITemplateInfo,
  ITemplateStatus,
  SandboxState,
  ServerEvent,
  StartedFrom
} from './tokens';

type Fields = Readonly<Record<string, unknown>>;

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

function isFields(value: unknown): value is Fields {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function fields(value: unknown, what: string): Fields {
  if (!isFields(value)) {
    throw new WireError(`${what} is not an object`);
  }
  return value;
}

function text(value: unknown, fallback = ''): string {
  return typeof value === 'string' ? value : fallback;
}

function textOrNull(value: unknown): string | null {
  return typeof value === 'string' ? value : null;
}

function number(value: unknown, fallback = 0): number {
  return typeof value === 'number' && Number.isFinite(value) ? value : fallback;
}

function numberOrNull(value: unknown): number | null {
  return typeof value === 'number' && Number.isFinite(value) ? value : null;
}

function list(value: unknown): readonly unknown[] {
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
    simulated: data.simulated === true
  };
}

function readLease(value: unknown): ILease {
  const data = fields(value, 'lease');
  return { sandbox_id: text(data.sandbox_id), since: number(data.since) };
}

export function readGpu(value: unknown): IGpu {
  const data = fields(value, 'GPU');
  return { ...readDevice(data), lease: maybe(data.lease, readLease) };
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
    network: oneOf(data.network, ['none', 'host'], 'host'),
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
    resumed_ms: numberOrNull(data.resumed_ms)
  };
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
    created_at: number(data.created_at),
    image_bytes: number(data.image_bytes),
    layer_bytes: number(data.layer_bytes),
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
