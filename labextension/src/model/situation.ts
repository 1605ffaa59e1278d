/*
 * What is known about one notebook's kernel, and what follows from it. Pure.
 */
import type { TranslationBundle } from '@jupyterlab/translation';

import type { IChoice, IErrorInfo, ISandboxInfo } from '../forms';
import { isAlive } from './state';

/** What is known about one notebook and its kernel. */
export interface ISituation {
  /** The kernelspec in use or about to be used; null for none. */
  readonly kernelName: string | null;
  /** Whether that is one of Warmcell's. */
  readonly ours: boolean;
  /** Whether a kernel is there (it may be dead). */
  readonly hasKernel: boolean;
  /** JupyterLab's word for what the kernel does: "idle", "restarting", "dead" and so on. */
  readonly status: string;
  readonly sandbox: ISandboxInfo | null;
  /** What the notebook remembers that it asks for. */
  readonly choice: IChoice;
  /** Whether the event stream is open; null while it is not yet known. */
  readonly connected: boolean | null;
  readonly trouble: IErrorInfo | null;
  /** Now and the moment since when the kernel has been starting, on the server's clock. */
  readonly now: number;
  readonly startingSince: number;
  /** What the user calls another sandbox: its notebook's file name; null if it has none. */
  readonly nameOf: (sandboxId: string) => string | null;
}

/** The error code of a kernel that ended by itself. */
export const DIED = 'sandbox_died';

const STARTING: ReadonlySet<string> = new Set([
  'initializing',
  'starting',
  'connecting',
  'restarting',
  'autorestarting'
]);

/** Whether JupyterLab's word for a kernel's state means that it is on its way. */
export function isStartingStatus(status: string): boolean {
  return STARTING.has(status);
}

export function isStarting(sandbox: ISandboxInfo): boolean {
  return (
    sandbox.state === 'creating' ||
    sandbox.state === 'resuming' ||
    // Between being up and its first kernel a sandbox is running, but nobody can use it yet.
    (sandbox.state === 'running' && (sandbox.phase !== null || sandbox.generation === 0))
  );
}

/** Whether a sandbox has no kernel and is not about to get one: it failed, or the kernel in it ended by itself. */
export function isBroken(sandbox: ISandboxInfo): boolean {
  return (
    sandbox.state === 'failed' ||
    (sandbox.state === 'running' && sandbox.error !== null && !isStarting(sandbox))
  );
}

/** Whether what is shown changes with every second. */
export function isTicking({ ours, sandbox, status, connected }: ISituation): boolean {
  if (!ours) {
    return false;
  }
  return sandbox === null
    ? STARTING.has(status) && connected !== false
    : sandbox.queue !== null ||
        isStarting(sandbox) ||
        (isAlive(sandbox) && sandbox.template?.state === 'importing');
}

export function startWord(
  situation: ISituation,
  sandbox: ISandboxInfo,
  trans: TranslationBundle
): string {
  if (sandbox.state === 'resuming') {
    return trans.__('resuming');
  }
  return situation.status === 'restarting' || situation.status === 'autorestarting'
    ? trans.__('restarting')
    : trans.__('starting');
}

export function known(error: IErrorInfo | null, trans: TranslationBundle): IErrorInfo {
  return (
    error ?? {
      code: 'error',
      message: trans.__('The sandbox of this kernel failed.'),
      hint: trans.__('Try again; `warmcell doctor` in a terminal says what this machine lacks.')
    }
  );
}
