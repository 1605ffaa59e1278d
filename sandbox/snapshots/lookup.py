"""Which snapshot somebody means, and which go first: decisions over what is there, without a look at any file."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from warmcell.sandbox.errors import CapacityError, ConflictError, InvalidRequestError, SnapshotNotFoundError
from warmcell.sandbox.models import SandboxId, SnapshotId, SnapshotInfo, SnapshotKind

Kind = SnapshotKind

NAME_MAX = 200
"""Characters of a snapshot's name."""


def check_name(name: str) -> None:
    """Refuse what is no name for a snapshot; an empty one is none, and fine.

    Raises:
        InvalidRequestError: It is too long, or has characters that do not print.
    """
    if len(name) > NAME_MAX or name != name.strip() or not name.isprintable():
        raise InvalidRequestError(
            f"{name!r} cannot be the name of a snapshot",
            hint=f"At most {NAME_MAX} characters that can be printed, without space at either end.",
        )


def scope(info: SnapshotInfo) -> str:
    """Within what its name is unique: its kernel, which may go from sandbox to sandbox, else its sandbox."""
    return info.kernel_id or info.sandbox_id or ""


def select(
    infos: Iterable[SnapshotInfo],
    *,
    sandbox_id: SandboxId | None = None,
    kernel_id: str | None = None,
    kind: Kind | None = None,
) -> list[SnapshotInfo]:
    """Those of the sandbox or of the kernel, and of the kind, where these are given; the newest first."""
    anywhere = sandbox_id is None and kernel_id is None
    found = [
        info
        for info in infos
        if (anywhere or _is(info.sandbox_id, sandbox_id) or _is(info.kernel_id, kernel_id))
        and (kind is None or info.kind == kind)
    ]
    return sorted(found, key=lambda info: (-info.created_at, info.id))


def find(
    infos: Sequence[SnapshotInfo], ref: str, *, sandbox_id: SandboxId | None = None, kernel_id: str | None = None
) -> SnapshotId:
    """The id of the snapshot that `ref` names, by its name in that sandbox or kernel, or by its id.

    Raises:
        SnapshotNotFoundError: There is none; the hint has names that are near.
        ConflictError: Several kernels have a snapshot of this name, and none was given.
    """
    anywhere = sandbox_id is None and kernel_id is None
    by_id = [info.id for info in infos if info.id == ref]
    if by_id and anywhere:
        return by_id[0]
    near = select(infos, sandbox_id=sandbox_id, kernel_id=kernel_id)
    named = [info for info in near if ref and info.name == ref]
    if len({scope(info) for info in named}) > 1:
        raise ConflictError(
            f"Several kernels have a snapshot {ref!r}", hint=f"Use an id: {', '.join(info.id for info in named)}."
        )
    if named:
        return named[0].id
    if by_id:
        return by_id[0]
    raise SnapshotNotFoundError(f"There is no snapshot {ref!r}", hint=_near(near, ref))


def _near(infos: Sequence[SnapshotInfo], ref: str) -> str:
    words = [word for info in infos for word in (info.name, info.id) if word]
    close = difflib.get_close_matches(ref, words, n=3)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    names = [info.name for info in infos if info.name][:5]
    if names:
        return f"There are: {', '.join(names)}."
    return "`warmcell snapshots ls` lists what there is."


def is_expired(info: SnapshotInfo, *, now: float, ttl_s: float | None) -> bool:
    """Whether its time is over: its own, or its age since its last use.

    A suspended kernel does not age: it may be all that there is of somebody's work.
    """
    if info.expires_at is not None and now >= info.expires_at:
        return True
    return ttl_s is not None and info.kind != "suspended" and now >= info.last_used_at + ttl_s


def room(
    infos: Sequence[SnapshotInfo],
    *,
    used_bytes: int,
    wanted_bytes: int,
    quota_bytes: int,
    shared: Mapping[SnapshotId, int] = MappingProxyType({}),
) -> list[SnapshotId]:
    """What to remove so that `wanted_bytes` more stay within the quota, the least missed first.

    Those without a name go before those with one, each by their last use; suspended kernels never go. `infos` are
    those that may go as far as their use is concerned; `used_bytes` is of all.

    Raises:
        CapacityError: All that may go is not enough.
    """
    excess = used_bytes + wanted_bytes - quota_bytes
    going: list[SnapshotId] = []
    spare = [info for info in infos if info.kind != "suspended"]
    for info in sorted(spare, key=lambda info: (bool(info.name), info.last_used_at, info.id)):
        if excess <= 0:
            break
        going.append(info.id)
        excess -= size(info, shared)
    if excess > 0:
        raise CapacityError(
            f"{wanted_bytes} bytes more of snapshots do not fit into the quota of {quota_bytes} bytes",
            hint="Shut down suspended kernels, remove snapshots with `warmcell snapshots rm`, or ask for a larger "
            "c.Warmcell.snapshot_quota.",
            details={"used_bytes": used_bytes, "wanted_bytes": wanted_bytes, "quota_bytes": quota_bytes},
        )
    return going


def size(info: SnapshotInfo, shared: Mapping[SnapshotId, int] = MappingProxyType({})) -> int:
    """What it takes on the disk by itself, and its part of what it shares."""
    return info.image_bytes + info.layer_bytes + shared.get(info.id, 0)


def _is(one: str | None, other: str | None) -> bool:
    return other is not None and one == other
