/*
 * The snapshots of a kernel as lines in time. Pure.
 *
 * A kernel that is put back to a snapshot begins a line there. So those snapshots are on one line that have the same
 * parent: they were taken one after the other, without going back in between.
 */
import type { IKernelSnapshots, ISnapshotInfo, ISnapshots } from '../forms';

/** What is drawn of one line beside one row. */
export interface ILane {
  /** Whether the line goes on above and below the middle of the row. */
  readonly up: boolean;
  readonly down: boolean;
  /** Whether the row is on this line. */
  readonly dot: boolean;
  /** Whether the line begins at the row's own dot, which is on another. */
  readonly begins: boolean;
}

/** One row: a snapshot, or the kernel as it is now. */
export interface IMoment {
  /** Null for now. */
  readonly snapshot: ISnapshotInfo | null;
  /** What it was put back to before; null if it never was. */
  readonly parent: ISnapshotInfo | null;
  readonly lanes: readonly ILane[];
}

/**
 * Of all snapshots those that a kernel can be put back to, the newest first: the named ones of its own, and any that was
 * brought in. Their parents are among them: what lies between is left out.
 *
 * @param now - The snapshot that its sandbox was last restored from.
 */
export function choosable(
  { snapshots, imports }: ISnapshots,
  kernelId: string,
  now: string | null
): IKernelSnapshots {
  const byId = new Map(snapshots.map(snapshot => [snapshot.id, snapshot]));
  const kept = snapshots.filter(
    ({ kind, kernel_id }) => kind === 'named' && (kernel_id === null || kernel_id === kernelId)
  );
  const listed = new Set(kept.map(({ id }) => id));
  return {
    snapshots: kept
      .map(snapshot => ({ ...snapshot, parent: nearest(snapshot.parent, listed, byId) }))
      .sort((one, other) => other.created_at - one.created_at),
    imports,
    now: nearest(now, listed, byId)
  };
}

/** The first ancestor that is listed. */
function nearest(
  id: string | null,
  listed: ReadonlySet<string>,
  byId: ReadonlyMap<string, ISnapshotInfo>
): string | null {
  const seen = new Set<string>();
  let here = id;
  while (here !== null && !listed.has(here)) {
    if (seen.has(here)) {
      return null;
    }
    seen.add(here);
    here = byId.get(here)?.parent ?? null;
  }
  return here;
}

/**
 * The rows, the newest first, with the kernel as it is now before all.
 *
 * @param snapshots - The newest first.
 * @param now - The snapshot that the kernel was last put back to; null if it never was.
 */
export function timeline(snapshots: readonly ISnapshotInfo[], now: string | null): IMoment[] {
  const place = new Map(snapshots.map(({ id }, index) => [id, index + 1]));
  const known = (id: string | null): string => (id !== null && place.has(id) ? id : '');
  const parents = [known(now), ...snapshots.map(({ parent }) => known(parent))];
  // The eldest line is the first.
  const lines = [...new Set([...parents].reverse())];
  const spans = lines.map(parent => {
    const rows = parents.flatMap((one, row) => (one === parent ? [row] : []));
    return {
      top: Math.min(...rows),
      bottom: place.get(parent) ?? Math.max(...rows),
      begins: place.get(parent) ?? -1
    };
  });
  return parents.map((parent, row) => ({
    snapshot: snapshots[row - 1] ?? null,
    parent: snapshots[(place.get(parent) ?? 0) - 1] ?? null,
    lanes: spans.map(({ top, bottom, begins }, lane) => ({
      up: row > top && row <= bottom,
      down: row >= top && row < bottom,
      dot: lines[lane] === parent,
      begins: row === begins
    }))
  }));
}
