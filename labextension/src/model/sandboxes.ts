import { Poll } from '@lumino/polling';
import { type ISignal, Signal } from '@lumino/signaling';

import type { Api } from '../api';
import { ApiError } from '../api';
import type {
  IChoice,
  IErrorInfo,
  IGpus,
  IMeters,
  IKernelSnapshots,
  ISandboxInfo,
  ISnapshotInfo,
  ITemplateInfo,
  ServerEvent
} from '../forms';
import type { ISandboxes } from '../tokens';
import { EMPTY, ofKernel, ofNotebook, reduce, type IState } from './state';
import { choosable } from './timeline';

/** Between the end of one stream and the next attempt. */
const RETRY_MS = 500;
const RETRY_MAX_MS = 30_000;

/**
 * A hidden page closes its stream after this long: browsers allow six connections per server over all tabs, and a
 * stream occupies one of them.
 */
const HIDDEN_MS = 20_000;

/** The Date header counts whole seconds; a smaller difference of the clocks is noise. */
const SKEW_FLOOR_S = 2;

/**
 * What the page knows about sandboxes, fed by the server's event stream.
 */
export class SandboxesModel implements ISandboxes {
  /**
   * @param api - The server.
   * @param root - The server's root folder as JupyterLab tells it, with "~" for the home directory.
   */
  constructor(api: Api, root: string) {
    this._api = api;
    this._root = root;
    this._poll = new Poll({
      name: '@warmcell/labextension:events',
      auto: false,
      factory: () => this._follow(),
      frequency: { interval: RETRY_MS, backoff: true, max: RETRY_MAX_MS },
      standby: 'when-hidden',
      linger: 0
    });
    document.addEventListener('visibilitychange', this._onVisibility);
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  get told(): ISignal<this, ISandboxInfo> {
    return this._told;
  }

  get disposed(): ISignal<this, void> {
    return this._disposed;
  }

  get isDisposed(): boolean {
    return this._isDisposed;
  }

  get connected(): boolean | null {
    return this._connected;
  }

  get trouble(): IErrorInfo | null {
    return this._trouble;
  }

  get version(): string | null {
    return this._version;
  }

  get templates(): readonly ITemplateInfo[] {
    return [...this._state.templates.values()];
  }

  get all(): readonly ISandboxInfo[] {
    return [...this._state.sandboxes.values()];
  }

  get(id: string): ISandboxInfo | null {
    return this._state.sandboxes.get(id) ?? null;
  }

  ofKernel(kernelId: string): ISandboxInfo | null {
    return ofKernel(this._state, kernelId);
  }

  ofNotebook(path: string): ISandboxInfo | null {
    return ofNotebook(this._state, path, this._root);
  }

  now(): number {
    return Date.now() / 1000 + this._skew_s;
  }

  gpus(): Promise<IGpus> {
    return this._api.gpus();
  }

  meters(): Promise<IMeters> {
    return this._api.meters();
  }

  check(choice: IChoice): Promise<void> {
    return this._api.check(choice);
  }

  configure(kernelId: string, choice: IChoice): Promise<void> {
    return this._api.configure(kernelId, choice);
  }

  suspend(id: string): Promise<void> {
    return this._api.suspend(id);
  }

  resume(id: string): Promise<void> {
    return this._api.resume(id);
  }

  park(id: string): Promise<void> {
    return this._api.park(id);
  }

  wake(id: string, returned: boolean): Promise<void> {
    return this._api.wake(id, returned);
  }

  changeGpu(id: string, gpu: string | readonly string[] | null): Promise<void> {
    return this._api.changeGpu(id, gpu);
  }

  leaveQueue(id: string): Promise<void> {
    return this._api.leaveQueue(id);
  }

  fork(id: string, snapshotId?: string): Promise<ISandboxInfo> {
    return this._api.fork(id, snapshotId);
  }

  open(id: string): Promise<void> {
    return this._api.open(id);
  }

  portUrl(id: string, port: number): Promise<string> {
    return this._api.portUrl(id, port);
  }

  stop(id: string): Promise<void> {
    return this._api.stop(id);
  }

  saveSnapshot(id: string, name: string): Promise<ISnapshotInfo> {
    return this._api.saveSnapshot(id, name);
  }

  async snapshots(kernelId: string): Promise<IKernelSnapshots> {
    const found = await this._api.snapshots();
    return choosable(found, kernelId, this.ofKernel(kernelId)?.snapshot ?? null);
  }

  restoreSnapshot(id: string, snapshotId: string): Promise<void> {
    return this._api.restoreSnapshot(id, snapshotId);
  }

  removeSnapshot(snapshotId: string): Promise<void> {
    return this._api.removeSnapshot(snapshotId);
  }

  renameSnapshot(snapshotId: string, name: string): Promise<ISnapshotInfo> {
    return this._api.renameSnapshot(snapshotId, name);
  }

  snapshotUrl(snapshotId: string): string {
    return this._api.snapshotUrl(snapshotId);
  }

  importSnapshot(file: Blob): Promise<ISnapshotInfo> {
    return this._api.importSnapshot(file);
  }

  /** Begin to follow the server's events. */
  start(): void {
    void this._poll.start();
  }

  dispose(): void {
    if (this._isDisposed) {
      return;
    }
    this._isDisposed = true;
    document.removeEventListener('visibilitychange', this._onVisibility);
    window.clearTimeout(this._hiddenTimer);
    this._poll.dispose();
    this._stream?.abort();
    this._disposed.emit();
    Signal.clearData(this);
  }

  private async _follow(): Promise<void> {
    this._stream?.abort();
    const stream = (this._stream = new AbortController());
    try {
      await this._api.events(
        stream.signal,
        ({ skew_s }) => {
          this._skew_s = Math.abs(skew_s) < SKEW_FLOOR_S ? 0 : skew_s;
          this._trouble = null;
        },
        event => {
          if (!stream.signal.aborted) {
            this._receive(event);
          }
        }
      );
    } catch (reason) {
      if (this._isDisposed || stream.signal.aborted) {
        return;
      }
      this._trouble =
        reason instanceof ApiError
          ? reason
          : { code: 'protocol', message: String(reason), hint: '' };
      throw reason;
    } finally {
      if (!this._isDisposed && this._stream === stream) {
        this._connected = false;
        this._changed.emit();
      }
    }
  }

  private _receive(event: ServerEvent): void {
    this._connected = true;
    this._state = reduce(this._state, event);
    if (event.kind === 'hello') {
      this._version = event.version;
    }
    this._changed.emit();
    if (event.kind === 'sandbox') {
      this._told.emit(event.sandbox);
    }
  }

  private readonly _onVisibility = (): void => {
    window.clearTimeout(this._hiddenTimer);
    if (document.visibilityState === 'hidden') {
      this._hiddenTimer = window.setTimeout(() => {
        this._stream?.abort();
      }, HIDDEN_MS);
    } else if (this._connected === false) {
      void this._poll.refresh();
    }
  };

  private readonly _api: Api;
  private readonly _root: string;
  private readonly _poll: Poll;
  private readonly _changed = new Signal<this, void>(this);
  private readonly _told = new Signal<this, ISandboxInfo>(this);
  private readonly _disposed = new Signal<this, void>(this);
  private _state: IState = EMPTY;
  private _stream: AbortController | null = null;
  private _connected: boolean | null = null;
  private _trouble: IErrorInfo | null = null;
  private _version: string | null = null;
  private _skew_s = 0;
  private _hiddenTimer = 0;
  private _isDisposed = false;
}
