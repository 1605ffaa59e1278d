import type { IDisposable } from '@lumino/disposable';
import { Poll } from '@lumino/polling';
import { type ISignal, Signal } from '@lumino/signaling';

import type { IMeters, IUsage } from '../forms';
import type { ISandboxes, IUsageFeed } from '../tokens';
import { isAlive } from './state';

const LIVE_MS = 3000;

/** Where nothing of the user's runs only the machine's own meters change. */
const QUIET_MS = 15_000;

const BACKOFF_MAX_MS = 60_000;

/** How many readings are kept for a line: two minutes. */
const KEPT = 40;

/**
 * What sandboxes and machine use, asked for again and again while the page is in sight.
 */
export class UsageFeed implements IUsageFeed, IDisposable {
  constructor(sandboxes: ISandboxes) {
    this._sandboxes = sandboxes;
    this._poll = new Poll({
      name: '@warmcell/labextension:usage',
      auto: false,
      factory: () => this._look(),
      frequency: { interval: LIVE_MS, backoff: true, max: BACKOFF_MAX_MS },
      standby: 'when-hidden'
    });
    sandboxes.changed.connect(this._onChanged, this);
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  get latest(): IMeters | null {
    return this._history.at(-1) ?? null;
  }

  get isDisposed(): boolean {
    return this._poll.isDisposed;
  }

  of(id: string): IUsage | null {
    return this.latest?.sandboxes.get(id) ?? null;
  }

  history(id: string): IUsage[] {
    return this._history.flatMap(meters => meters.sandboxes.get(id) ?? []);
  }

  /** Begin to ask. */
  start(): void {
    void this._poll.start();
  }

  dispose(): void {
    if (!this.isDisposed) {
      this._sandboxes.changed.disconnect(this._onChanged, this);
      this._poll.dispose();
      Signal.clearData(this);
    }
  }

  private async _look(): Promise<void> {
    const meters = await this._sandboxes.meters();
    if (!this.isDisposed) {
      this._history = [...this._history, meters].slice(-KEPT);
      this._pace();
      this._changed.emit();
    }
  }

  /** What has just begun is not to wait long for its first reading. */
  private _onChanged(): void {
    if (this._pace()) {
      void this._poll.refresh();
    }
  }

  private _pace(): boolean {
    const interval = this._sandboxes.all.some(isAlive) ? LIVE_MS : QUIET_MS;
    if (this._poll.frequency.interval === interval) {
      return false;
    }
    this._poll.frequency = { ...this._poll.frequency, interval };
    return interval === LIVE_MS;
  }

  private readonly _sandboxes: ISandboxes;
  private readonly _poll: Poll;
  private readonly _changed = new Signal<this, void>(this);
  private _history: readonly IMeters[] = [];
}
