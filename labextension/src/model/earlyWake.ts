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

/** Whether a key that was pressed in code is for writing or running it; other shortcuts are not. */
export function isWriting({ key, ctrlKey, metaKey, altKey }: IKey): boolean {
  // Where there is AltGr it is told as both.
  const isShortcut = metaKey || ctrlKey !== altKey;
  return key === 'Enter' || !(SILENT.has(key) || isShortcut);
}

/**
 * Tells that a cell is likely to come: once for each time that the kernel was parked.
 */
export class EarlyWake {
  /**
   * @param wake - Ask the server; whatever it says, the cell does what a cell does.
   */
  constructor(wake: (sandboxId: string) => Promise<void>) {
    this._wake = wake;
  }

  /** There was a sign in the notebook whose kernel has this sandbox. */
  sign(sandbox: ISandboxInfo | null): void {
    if (sandbox?.state !== 'running' || sandbox.parked === null) {
      return;
    }
    const parking = `${sandbox.id} ${sandbox.parked.since}`;
    if (parking !== this._told) {
      this._told = parking;
      this._wake(sandbox.id).catch(() => undefined);
    }
  }

  private readonly _wake: (sandboxId: string) => Promise<void>;
  private _told = '';
}
