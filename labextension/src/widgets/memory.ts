import { InputDialog } from '@jupyterlab/apputils';
import { PathExt } from '@jupyterlab/coreutils';
import type { TranslationBundle } from '@jupyterlab/translation';

import type { NotebookSandbox } from '../model/notebook';
import * as words from '../model/words';
import type { ISandboxes } from '../tokens';
import { orSayWhy, sayDone, slowly } from './saying';

/** A sandbox with which something is done. */
export interface ITarget {
  readonly id: string;
  /** Null if it has no kernel of Jupyter's. */
  readonly kernelId: string | null;
  /** As its user calls it: a notebook's file name. */
  readonly name: string;
  readonly sandboxes: ISandboxes;
  readonly trans: TranslationBundle;
}

/** The sandbox of a notebook's kernel; null if there is none. */
export function targetOf({ sandbox, sandboxes, context, trans }: NotebookSandbox): ITarget | null {
  return sandbox === null
    ? null
    : {
        id: sandbox.id,
        kernelId: sandbox.kernel_id,
        name: PathExt.basename(context.path),
        sandboxes,
        trans
      };
}

/** Save the memory of a sandbox and end its processes; if that is refused, say why. */
export async function suspend({ id, name, sandboxes }: ITarget): Promise<void> {
  await orSayWhy(name, () => sandboxes.suspend(id));
}

/** Have a sandbox go on; if it cannot, say why. */
export async function resume({ id, name, sandboxes }: ITarget): Promise<void> {
  await orSayWhy(name, () => sandboxes.resume(id));
}

/** Give a sandbox's GPU back; if that is refused, say why. */
export async function park({ id, name, sandboxes, trans }: ITarget): Promise<void> {
  await orSayWhy(name, () => slowly(trans.__('Giving its GPU back…'), sandboxes.park(id)));
}

/** End a sandbox; if it does not, say why. */
export async function stop({ id, name, sandboxes }: ITarget): Promise<void> {
  await orSayWhy(name, () => sandboxes.stop(id));
}

/** Have a sandbox wait for a GPU no longer; if it does not wait, say so. */
export async function leaveQueue({ id, name, sandboxes }: ITarget): Promise<void> {
  await orSayWhy(name, () => sandboxes.leaveQueue(id));
}

/** Ask for a name and save a kernel under it. */
export async function saveSnapshot({ id, name, sandboxes, trans }: ITarget): Promise<void> {
  const { button, value } = await InputDialog.getText({
    title: trans.__('Save Snapshot of %1', name),
    label: trans.__('All variables and private files as they are now, to come back to. Its name:'),
    placeholder: trans.__('before training'),
    okLabel: trans.__('Save'),
    required: true
  });
  const called = value?.trim() ?? '';
  if (!button.accept || called === '') {
    return;
  }
  await orSayWhy(name, async () => {
    const pending = trans.__('Saving “%1”…', called);
    const saved = await slowly(pending, sandboxes.saveSnapshot(id, called));
    const size = words.bytes(saved.image_bytes + saved.layer_bytes);
    sayDone(trans.__('Saved “%1” (%2)', called, size));
  });
}

/** Put a kernel back to one of its snapshots; if it cannot, say why. */
export async function restoreSnapshot(
  { id, name, sandboxes, trans }: ITarget,
  snapshot: { readonly id: string; readonly name: string }
): Promise<void> {
  await orSayWhy(name, async () => {
    const called = snapshot.name || snapshot.id;
    await slowly(
      trans.__('Going back to “%1”…', called),
      sandboxes.restoreSnapshot(id, snapshot.id)
    );
    sayDone(trans.__('The kernel is as it was in “%1”', called));
  });
}
