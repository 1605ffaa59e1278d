/*
 * Clones that cells have made: sandboxes with a kernel that is in no list of Jupyter's. Pure.
 */
import type { ISandboxInfo } from '../tokens';
import { isAlive } from './state';

/** A clone, and the kernel of Jupyter's that it or what it is a clone of was made from. */
export interface IClone {
  readonly sandbox: ISandboxInfo;
  readonly source: ISandboxInfo;
}

/**
 * The clones of some kernels, the eldest first.
 *
 * @param sandboxes - All that there are, those of other servers included.
 * @param isListed - Whether a kernel is one of this server's.
 */
export function clonesOf(
  sandboxes: readonly ISandboxInfo[],
  isListed: (kernelId: string) => boolean
): IClone[] {
  const byId = new Map(sandboxes.map(sandbox => [sandbox.id, sandbox]));
  const found: IClone[] = [];
  for (const sandbox of sandboxes) {
    const isClone = sandbox.owner === 'fork' && isAlive(sandbox);
    if (!isClone || sandbox.kernel_id === null || isListed(sandbox.kernel_id)) {
      continue;
    }
    let source = byId.get(sandbox.parent ?? '');
    while (source !== undefined && !isListed(source.kernel_id ?? '')) {
      source = byId.get(source.parent ?? '');
    }
    if (source !== undefined) {
      found.push({ sandbox, source });
    }
  }
  return found.sort((one, other) => one.sandbox.created_at - other.sandbox.created_at);
}
