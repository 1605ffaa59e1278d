/* Forms to test with; each test names only what it is about. */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { ISituation } from '../src/model/situation';
import type { IGpu, IGpuDevice, ISandboxInfo, ISnapshotInfo, ITemplateStatus } from '../src/tokens';

export const GIB = 2 ** 30;

/** English: as JupyterLab's own translator without a language pack. */
export const trans = {
  __: (text: string, ...args: unknown[]) =>
    text.replace(/%(\d)/g, (_, place: string) => String(args[Number(place) - 1]))
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
    ...change
  };
}

export function snapshot(change: Partial<ISnapshotInfo> = {}): ISnapshotInfo {
  return {
    id: 's1',
    name: 'first',
    kind: 'named',
    kernel_id: 'k1',
    created_at: 1000,
    image_bytes: 0,
    layer_bytes: 0,
    memory_bytes: 0,
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
    ...change
  };
}

export function gpu(change: Partial<IGpu> = {}): IGpu {
  return { ...device(), lease: null, ...change };
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
    ...change
  };
}
