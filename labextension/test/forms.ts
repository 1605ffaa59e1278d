/* Forms to test with; each test names only what it is about. */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { ISituation } from '../src/model/situation';
import type {
  IGpu,
  IGpuDevice,
  ILease,
  ISandboxInfo,
  ISnapshotInfo,
  ITemplateStatus,
  IUsage
} from '../src/forms';

export const GIB = 2 ** 30;

/** English: as JupyterLab's own translator without a language pack. */
export const trans = {
  __: (text: string, ...args: unknown[]) =>
    text.replace(/%(\d)/g, (_, place: string) => String(args[Number(place) - 1])),
  _n: (one: string, many: string, n: number) => (n === 1 ? one : many).replace('%1', String(n))
} as TranslationBundle;

export function sandbox(change: Partial<ISandboxInfo> = {}): ISandboxInfo {
  return {
    id: 'abc123def456',
    state: 'running',
    backend: 'bubblewrap',
    isolated: true,
    owner: 'notebook',
    parent: null,
    kernel_id: 'k1',
    notebook: '/home/ada/notes/demo.ipynb',
    workspace_note: '',
    network: 'none',
    gpu: null,
    gpus: [],
    limits: {},
    template: null,
    started_from: 'template',
    started_ms: 84.2,
    generation: 1,
    phase: null,
    created_at: 1000,
    error: null,
    previous_error: null,
    resumed_ms: null,
    not_saved: [],
    phases_ms: {},
    snapshot: null,
    queue: null,
    parked: null,
    ...change
  };
}

export function snapshot(change: Partial<ISnapshotInfo> = {}): ISnapshotInfo {
  return {
    id: 's1',
    name: 'first',
    kind: 'named',
    kernel_id: 'k1',
    parent: null,
    cell: null,
    created_at: 1000,
    image_bytes: 0,
    layer_bytes: 0,
    compressed: false,
    memory_bytes: 0,
    ...change
  };
}

export function usage(change: Partial<IUsage> = {}): IUsage {
  return {
    cpu: 0.5,
    memory_bytes: GIB,
    memory_limit_bytes: null,
    busy: false,
    idle_s: 0,
    gpu_pct: null,
    vram_bytes: null,
    vram_total_bytes: null,
    ...change
  };
}

export function template(change: Partial<ITemplateStatus> = {}): ITemplateStatus {
  return {
    name: 'default',
    state: 'ready',
    importing: '',
    since: 0,
    imported: [],
    failed: {},
    ...change
  };
}

export function device(change: Partial<IGpuDevice> = {}): IGpuDevice {
  return {
    uuid: 'GPU-1',
    index: 0,
    name: 'A100-SXM4-80GB',
    memory_total_bytes: 80 * GIB,
    simulated: false,
    parts: 1,
    ...change
  };
}

export function lease(change: Partial<ILease> = {}): ILease {
  return { sandbox_id: 'abc', since: 0, mine: true, user: '', parts: 1, ...change };
}

export function gpu(change: Partial<IGpu> = {}): IGpu {
  const lease = change.lease ?? null;
  const leases = lease === null ? [] : [lease];
  return { ...device(), lease, leases, lost: false, ...change };
}

export function situation(change: Partial<ISituation> = {}): ISituation {
  return {
    kernelName: 'warmcell',
    ours: true,
    hasKernel: true,
    status: 'idle',
    sandbox: sandbox(),
    choice: {},
    connected: true,
    trouble: null,
    now: 2000,
    startingSince: 1990,
    nameOf: () => null,
    ...change
  };
}
