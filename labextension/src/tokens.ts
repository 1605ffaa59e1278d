import { Token } from '@lumino/coreutils';
import type { ISignal } from '@lumino/signaling';
import type { IObservableDisposable } from '@lumino/disposable';

import type {
  IChoice,
  IErrorInfo,
  IGpus,
  IKernelSnapshots,
  IMeters,
  ISandboxInfo,
  ISnapshotInfo,
  ITemplateInfo,
  IUsage
} from './forms';

/**
 * What the page knows about the sandboxes of this server, kept up to date by its event stream.
 */
export interface ISandboxes extends IObservableDisposable {
  /** Emitted after each change of what is known. */
  readonly changed: ISignal<ISandboxes, void>;

  /** Emitted for each sandbox that the server has told about. */
  readonly told: ISignal<ISandboxes, ISandboxInfo>;

  /** Whether the event stream is open; null until the first attempt has ended. */
  readonly connected: boolean | null;

  /** Why the event stream is closed, if it is. */
  readonly trouble: IErrorInfo | null;

  /** The server's version, as far as it said so. */
  readonly version: string | null;

  /** Templates in use, by name. */
  readonly templates: readonly ITemplateInfo[];

  /** All sandboxes that are known, those of the user's other servers included. */
  readonly all: readonly ISandboxInfo[];

  /** The sandbox of this id, if it is known. */
  get(id: string): ISandboxInfo | null;

  /** The latest sandbox of a kernel. */
  ofKernel(kernelId: string): ISandboxInfo | null;

  /** The latest sandbox that was asked for by the notebook at this path, relative to the server's root. */
  ofNotebook(path: string): ISandboxInfo | null;

  /** Now, in Unix seconds of the server's clock. */
  now(): number;

  /** @throws {@link ApiError} */
  gpus(): Promise<IGpus>;

  /**
   * What is used now.
   *
   * @throws {@link ApiError}
   */
  meters(): Promise<IMeters>;

  /**
   * Whether this could be started, without starting anything.
   *
   * @throws {@link ApiError} with the error that a start would give.
   */
  check(choice: IChoice): Promise<void>;

  /**
   * Set what the next start of this kernel uses.
   *
   * @throws {@link ApiError}
   */
  configure(kernelId: string, choice: IChoice): Promise<void>;

  /**
   * Save a sandbox's memory and end its processes; its kernel's next cell has it go on.
   *
   * @throws {@link ApiError} It runs on.
   */
  suspend(id: string): Promise<void>;

  /**
   * Have a suspended sandbox go on.
   *
   * @throws {@link ApiError} It stays suspended.
   */
  resume(id: string): Promise<void>;

  /**
   * Give a sandbox's GPU back and keep it alive; its kernel's next cell takes one again.
   *
   * @throws {@link ApiError} It keeps its GPU.
   */
  park(id: string): Promise<void>;

  /**
   * Say that a cell of a parked sandbox is likely to come: it goes on if a GPU is free.
   *
   * @param returned - Somebody has come back to the notebook; else it counts once between two cells.
   * @throws {@link ApiError} It is as it was.
   */
  wake(id: string, returned: boolean): Promise<void>;

  /**
   * Give the kernel of a sandbox another GPU, or none, with all its variables kept.
   *
   * @throws {@link ApiError} It has what it had; or it is suspended.
   */
  changeGpu(id: string, gpu: string | readonly string[] | null): Promise<void>;

  /**
   * Have a sandbox that waits for a GPU wait no longer.
   *
   * @throws {@link ApiError} It does not wait.
   */
  leaveQueue(id: string): Promise<void>;

  /**
   * Clone a sandbox with its kernel, which goes on.
   *
   * @param snapshotId - A snapshot of that kernel, of which the clone is to be; absent: the kernel as it is.
   * @returns the clone; its kernel is one of this server's.
   * @throws {@link ApiError} There is no clone.
   */
  fork(id: string, snapshotId?: string): Promise<ISandboxInfo>;

  /**
   * Have the kernel of a clone listed by this server; from then on it outlives what it was made from.
   *
   * @throws {@link ApiError} It is as it was.
   */
  open(id: string): Promise<void>;

  /**
   * End a sandbox and its kernel.
   *
   * @throws {@link ApiError}
   */
  stop(id: string): Promise<void>;

  /**
   * A URL of what listens on a port of a sandbox, good for an hour.
   *
   * @throws {@link ApiError}
   */
  portUrl(id: string, port: number): Promise<string>;

  /**
   * Save a sandbox's kernel under a name; it goes on.
   *
   * @throws {@link ApiError} Nothing is saved.
   */
  saveSnapshot(id: string, name: string): Promise<ISnapshotInfo>;

  /**
   * What a kernel can be put back to.
   *
   * @throws {@link ApiError}
   */
  snapshots(kernelId: string): Promise<IKernelSnapshots>;

  /**
   * Put a sandbox's kernel back to a snapshot of it.
   *
   * @throws {@link ApiError} It is as it was.
   */
  restoreSnapshot(id: string, snapshotId: string): Promise<void>;

  /**
   * Remove a snapshot.
   *
   * @throws {@link ApiError} It is still there.
   */
  removeSnapshot(snapshotId: string): Promise<void>;

  /**
   * Give a snapshot another name.
   *
   * @throws {@link ApiError} It keeps the one that it has.
   */
  renameSnapshot(snapshotId: string, name: string): Promise<ISnapshotInfo>;

  /** Where a snapshot is had as a file. */
  snapshotUrl(snapshotId: string): string;

  /**
   * Bring in such a file.
   *
   * @throws {@link ApiError} Nothing of it is there.
   */
  importSnapshot(file: Blob): Promise<ISnapshotInfo>;
}

export const ISandboxes = new Token<ISandboxes>(
  '@warmcell/labextension:ISandboxes',
  'What the page knows about the sandboxes of this server.'
);

/**
 * What sandboxes and machine use, kept up to date while the page is in sight.
 */
export interface IUsageFeed {
  /** Emitted after each reading. */
  readonly changed: ISignal<IUsageFeed, void>;

  /** The last reading; null before the first. */
  readonly latest: IMeters | null;

  /** What a sandbox used last; null if it does not run. */
  of(id: string): IUsage | null;

  /** What it has used of late, the oldest first. */
  history(id: string): readonly IUsage[];
}

export const IUsageFeed = new Token<IUsageFeed>(
  '@warmcell/labextension:IUsageFeed',
  'What sandboxes and machine use now.'
);

/** The translation domain of this package. */
export const DOMAIN = 'warmcell';

export namespace CommandIDs {
  export const chooseHardware = 'warmcell:choose-hardware';
  export const newNotebook = 'warmcell:new-notebook';
  export const suspend = 'warmcell:suspend';
  export const resume = 'warmcell:resume';
  export const park = 'warmcell:park';
  export const fork = 'warmcell:fork';
  export const saveSnapshot = 'warmcell:save-snapshot';
  export const restoreSnapshot = 'warmcell:restore-snapshot';
}
