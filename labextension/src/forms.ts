/*
 * The forms that the server speaks, as `warmcell.sandbox.models` defines them: `_bytes`, `_ms` and `_pct` are
 * units, times are Unix seconds of the server's clock.
 */

export type SandboxState =
  | 'creating'
  | 'running'
  | 'suspending'
  | 'suspended'
  | 'resuming'
  | 'stopping'
  | 'stopped'
  | 'failed';

/** Nothing, the machine's own, or hosts that are reached through the keeper's proxy. */
export type Network = 'none' | 'host' | readonly string[];

export type StartedFrom = 'template' | 'cold' | 'snapshot';

/** What went wrong and what cures it. */
export interface IErrorInfo {
  readonly code: string;
  readonly message: string;
  /** The cure, in one sentence; may be empty. */
  readonly hint: string;
}

/** What a start is busy with. */
export interface IPhase {
  readonly name: string;
  readonly since: number;
  readonly detail: string;
  readonly hint: string;
}

/** A place in the queue for a GPU. */
export interface IQueued {
  /** What is asked for. */
  readonly request: string;
  /** 1: the next to be served. */
  readonly place: number;
  readonly length: number;
  readonly since: number;
  /** Null if it cannot be told. */
  readonly estimate_s: number | null;
  /** Who has what would serve. */
  readonly why: string;
}

export interface ILimitStatus {
  readonly value: number | null;
  readonly enforced: boolean;
  /** Why it is not enforced, with the cure. */
  readonly why: string;
}

export interface ITemplateStatus {
  readonly name: string;
  readonly state: 'none' | 'importing' | 'ready' | 'failed';
  /** The module whose import runs, since `since`. */
  readonly importing: string;
  readonly since: number;
  readonly imported: readonly string[];
  /** Module to its import error. */
  readonly failed: Readonly<Record<string, string>>;
}

export interface ITemplateInfo {
  readonly name: string;
  readonly python: string;
  readonly preload: readonly string[];
  readonly status: ITemplateStatus;
  readonly prepared: number;
}

export interface IGpuDevice {
  readonly uuid: string;
  readonly index: number;
  readonly name: string;
  readonly memory_total_bytes: number;
  readonly simulated: boolean;
  /** A sandbox has one of so many shares of it; 1: all of it. */
  readonly parts: number;
}

export interface ILease {
  readonly sandbox_id: string;
  readonly since: number;
  /** Whether a sandbox of this user's has it; only then is `sandbox_id` one that the page knows. */
  readonly mine: boolean;
  /** Who has it, by name; may be empty. */
  readonly user: string;
  /** How many shares of the GPU, if it can be had in shares. */
  readonly parts: number;
}

/** A GPU of the machine and who holds it. */
export interface IGpu extends IGpuDevice {
  readonly lease: ILease | null;
  /** All leases on it: several where it is shared. */
  readonly leases: readonly ILease[];
  /** It fell off the bus. */
  readonly lost: boolean;
}

/** Somebody who waits for a GPU of the machine. */
export interface IWaiting {
  readonly sandbox_id: string;
  readonly request: string;
  readonly place: number;
}

/** The GPUs of the machine, and who waits for one. */
export interface IGpus {
  readonly gpus: readonly IGpu[];
  /** In order of arrival; null: whoever finds none free is refused. */
  readonly queue: readonly IWaiting[] | null;
  /** The most shares that a GPU may be cut into; 1: GPUs are had whole. */
  readonly shares: number;
  /** Why a GPU may be missing, with the cure; else empty. */
  readonly problem: string;
}

/** What a sandbox uses now; null where that is not known. */
export interface IUsage {
  /** Processors in use. */
  readonly cpu: number | null;
  readonly memory_bytes: number;
  readonly memory_limit_bytes: number | null;
  readonly busy: boolean;
  /** Since it was last used; null where nobody can tell. */
  readonly idle_s: number | null;
  readonly gpu_pct: number | null;
  readonly vram_bytes: number | null;
  readonly vram_total_bytes: number | null;
}

/** What a GPU of the machine does now; null where it does not say. */
export interface IGpuUsage extends IGpuDevice {
  readonly memory_used_bytes: number | null;
  readonly utilization_pct: number | null;
}

/** What is used at one moment. */
export interface IMeters {
  readonly at: number;
  readonly sandboxes: ReadonlyMap<string, IUsage>;
  readonly machine: {
    readonly cpus: number;
    readonly cpu: number | null;
    readonly memory_bytes: number;
    readonly memory_total_bytes: number;
    readonly gpus: readonly IGpuUsage[];
  };
}

export interface ISandboxInfo {
  readonly id: string;
  readonly state: SandboxState;
  readonly backend: string;
  readonly isolated: boolean;
  readonly owner: string;
  /** The sandbox from which it was made. */
  readonly parent: string | null;
  readonly kernel_id: string | null;
  readonly notebook: string | null;
  readonly workspace_note: string;
  readonly network: Network;
  readonly gpu: string | readonly string[] | null;
  readonly gpus: readonly IGpuDevice[];
  readonly limits: Readonly<Record<string, ILimitStatus>>;
  readonly template: ITemplateStatus | null;
  readonly started_from: StartedFrom | null;
  readonly started_ms: number | null;
  readonly generation: number;
  readonly phase: IPhase | null;
  readonly created_at: number;
  readonly error: IErrorInfo | null;
  /** Why the kernel before this one ended by itself. */
  readonly previous_error: IErrorInfo | null;
  /** From the request that woke it to its first answer; null if it was never suspended. */
  readonly resumed_ms: number | null;
  /** Commands that ran besides its kernel when that was saved, and are gone since. */
  readonly not_saved: readonly string[];
  /** What the last start, restore or resume spent its time on. */
  readonly phases_ms: Readonly<Record<string, number>>;
  /** The snapshot that it was last restored from, or is suspended as. */
  readonly snapshot: string | null;
  /** Its place, while it waits for a GPU. */
  readonly queue: IQueued | null;
  /** It runs, and its GPUs are given back until its next cell; null if it has what it asked for. */
  readonly parked: IParked | null;
}

/** What a parked sandbox had on GPUs, and has in the host's memory now. */
export interface IParked {
  /** Unix time. */
  readonly since: number;
  readonly vram_bytes: number;
  /** What of it is on the GPUs still, where the driver could not take it off. */
  readonly stays_bytes: number;
}

/** A saved state of a kernel. */
export interface ISnapshotInfo {
  readonly id: string;
  /** As its user calls it; empty if nobody named it. */
  readonly name: string;
  /** What it is for: "named" ones are the user's own. */
  readonly kind: string;
  /** The kernel that it is of; null for one that was brought in. */
  readonly kernel_id: string | null;
  /** The snapshot that its kernel had been restored from. */
  readonly parent: string | null;
  /** The number of the last cell that its kernel had begun; null if that is not known. */
  readonly cell: number | null;
  readonly created_at: number;
  /** What it takes on the disk: memory and files. */
  readonly image_bytes: number;
  readonly layer_bytes: number;
  /** Whether that is less than it was written as, and it takes longer to come back. */
  readonly compressed: boolean;
  /** How much memory it brings back. */
  readonly memory_bytes: number;
}

/** What a kernel can be put back to. */
export interface ISnapshots {
  /** The newest first: its own, and those that were brought in. */
  readonly snapshots: readonly ISnapshotInfo[];
  /** Whether the server takes snapshots from elsewhere. */
  readonly imports: boolean;
}

/** What one kernel can be put back to. */
export interface IKernelSnapshots extends ISnapshots {
  /** The one that it was last put back to; null if it never was. */
  readonly now: string | null;
}

/** One message of the server's event stream. */
export type ServerEvent =
  | {
      readonly kind: 'hello';
      readonly sandboxes: readonly ISandboxInfo[];
      readonly templates: readonly ITemplateInfo[];
      /** The server's version; null if it does not say. */
      readonly version: string | null;
    }
  | { readonly kind: 'sandbox'; readonly sandbox: ISandboxInfo }
  | { readonly kind: 'template'; readonly template: ITemplateInfo };

/** What a notebook asks for; what is absent is left to the kernelspec. */
export interface IChoice {
  /** A request such as "A100:2", or several as fallbacks in order; null is CPU. */
  readonly gpu?: string | readonly string[] | null;
  readonly memory_bytes?: number;
  readonly network?: Network;
  readonly template?: string;
}
