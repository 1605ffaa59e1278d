/*
 * Signs that a cell is about to be run. Pure.
 */
import type { ISandboxInfo } from '../forms';

/** What of a key press matters here. */
export type IKey = Pick<KeyboardEvent, 'key' | 'ctrlKey' | 'metaKey' | 'altKey'>;

/** Keys that write nothing by themselves. */
const SILENT: ReadonlySet<string> = new Set([
  ...['Shift', 'Control', 'Alt', 'AltGraph', 'Meta', 'CapsLock', 'NumLock', 'ScrollLock', 'Fn'],
  ...['Escape', 'ContextMenu', 'PrintScreen', 'Pause']
]);

/** Whoever has not touched a notebook for so long, and does, has come back to it. */
export const AWAY_MS = 120_000;

/** Whether a key is for writing, running, or getting about in a notebook; other shortcuts are not: they may leave it. */
export function isWriting({ key, ctrlKey, metaKey, altKey }: IKey): boolean {
  // Where there is AltGr it is told as both.
  const isShortcut = metaKey || ctrlKey !== altKey;
  return key === 'Enter' || !(SILENT.has(key) || isShortcut);
}

/**
 * Tells that a cell is likely to come: when somebody comes back to the notebook, and when code is written, once for each
 * time that the kernel was parked.
 */
export class EarlyWake {
  /**
   * @param wake - Ask the server; whatever it says, the cell does what a cell does.
   * @param now - Milliseconds of a clock that only goes forward.
   */
  constructor(
    wake: (sandboxId: string, returned: boolean) => Promise<void>,
    now: () => number = () => performance.now()
  ) {
    this._wake = wake;
    this._now = now;
  }

  /** Somebody pressed something in the notebook whose kernel has this sandbox, `inCode` or elsewhere. */
  touch(sandbox: ISandboxInfo | null, inCode: boolean): void {
    if (sandbox === null) {
      return; // Nobody is asked, and whoever presses the next thing has come back all the same.
    }
    const now = this._now();
    const returned = now - this._touched >= AWAY_MS;
    this._touched = now;
    if (sandbox.state !== 'running') {
      return;
    }
    const parking = sandbox.parked && `${sandbox.id} ${sandbox.parked.since}`;
    const writes = parking !== null && inCode && parking !== this._told;
    if (writes) {
      this._told = parking;
    }
    // Also one that is not parked yet, so that it is not while somebody is there.
    if (writes || (returned && (parking !== null || sandbox.gpus.length > 0))) {
      this._wake(sandbox.id, returned).catch(() => undefined);
    }
  }

  private readonly _wake: (sandboxId: string, returned: boolean) => Promise<void>;
  private readonly _now: () => number;
  private _touched = -Infinity;
  private _told = '';
}
