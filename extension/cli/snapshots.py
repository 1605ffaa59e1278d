"""`warmcell snapshots`: saved kernels: list, verify, compress, remove, take out, bring in."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import quote, urlencode

from warmcell.extension.cli.link import running_keeper
from warmcell.extension.cli.output import WARNING, Verbs, duration, print_cure, print_json, print_table
from warmcell.extension.cli.progress import Progress, size
from warmcell.extension.cli.tokens import seconds
from warmcell.sandbox.errors import ConflictError, InvalidRequestError, WarmcellError, from_json
from warmcell.sandbox.models import ErrorInfo, SnapshotInfo

if TYPE_CHECKING:
    from warmcell.sandbox.client.keeper import SyncKeeperClient

HEADINGS = ("SNAPSHOT", "NAME", "KIND", "DISK", "MEMORY", "AGE", "LAST USED", "NOTEBOOK")
PIECE = 2**20
PASSING = ("fork", "template")
"""Kinds that `--older` never means."""
DAMAGED = 1
"""Exit code where a snapshot is not what was written."""
DAMAGE = ("snapshot_corrupt", "snapshot_incompatible", "snapshot_not_found")
"""What is said of a snapshot that is listed, and of nothing else."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the commands."""
    verbs = Verbs(commands, "snapshots", about="list, compress, remove, export and import snapshots of kernels")

    verbs.add(
        "ls",
        run_ls,
        about="list snapshots",
        description="List your snapshots, the newest first, with what each takes on the disk and how much memory "
        "its restore makes, and what ran besides a kernel and does not come back with it. Those that cannot be used "
        "are listed with the reason and the cure.",
    )

    check = verbs.add(
        "verify",
        run_verify,
        about="read snapshots and compare them with their checksums",
        description="Read all of your snapshots, or those named, memory and files, and compare them with what was "
        "written. Exit code 0: they are as they were written; 1: one is damaged; 3: of one not all checksums are there "
        "yet, as they are made in the background.",
    )
    check.add_argument("snapshot", nargs="*", metavar="SNAPSHOT", help="id or name (default: all)")

    smaller = verbs.add(
        "compress",
        run_compress,
        about="make snapshots smaller until they are used again",
        description="Compress memory and files of snapshots. Restoring one expands it first, one to two seconds for "
        "each GB. One that a running kernel came from cannot be; with --older it is passed over.",
    )
    smaller.add_argument("snapshot", nargs="*", metavar="SNAPSHOT", help="id or name")
    smaller.add_argument("--older", metavar="AGE", help='all that nobody has used for so long, such as "12h" or "7d"')

    rm = verbs.add("rm", run_rm, about="remove snapshots", description="Remove snapshots with their memory and files.")
    rm.add_argument("snapshot", nargs="+", metavar="SNAPSHOT", help="id or name")
    rm.add_argument("--force", "-f", action="store_true", help="even if it is all there is of a suspended kernel")

    out = verbs.add(
        "export",
        run_export,
        about="write a snapshot to a file",
        description="Write a snapshot to one compressed file. It holds all that was in the kernel's memory, keys and "
        "passwords included: only you may read it, and you should keep it so.",
    )
    out.add_argument("snapshot", metavar="SNAPSHOT", help="id or name")
    out.add_argument("file", metavar="FILE", type=Path, help="file to write")
    out.add_argument("--files-only", action="store_true", help="leave the memory out")

    into = verbs.add(
        "import",
        run_import,
        about="make a snapshot of a file",
        description="Make a snapshot of a file that `export` wrote. A snapshot decides what runs when it is restored, "
        "so this is refused unless c.Warmcell.import_snapshots is True.",
    )
    into.add_argument("file", metavar="FILE", type=Path, help="file to read")
    into.add_argument("--name", default="", help="name for the snapshot (default: the one it had)")


def run_ls(arguments: argparse.Namespace) -> int:
    """Print the list."""
    with _keeper() as keeper:
        answer = keeper.get("/snapshots")
    if arguments.json:
        print_json(answer)
        return 0
    infos = [SnapshotInfo.from_json(one) for one in answer["snapshots"]]
    if infos:
        print_table(HEADINGS, [row(info) for info in infos])
        for info in infos:
            if info.not_saved:
                print(f"{info.id} is without what ran besides its kernel: {', '.join(info.not_saved)}")
    else:
        print("No snapshots.")
    quota = answer["quota_bytes"]
    if infos or answer["unreadable"]:
        print(f"{size(answer['used_bytes'])} in use{f' of {size(quota)}' if quota is not None else ''}.")
    for one in answer["unreadable"]:
        error = ErrorInfo.from_json(one["error"])
        print(f"{one['id']} cannot be used: {error.message}")
        print_cure(error.hint)
    return 0


def row(info: SnapshotInfo) -> tuple[str, ...]:
    """A snapshot under the headings."""
    now = time.time()
    return (
        info.id,
        info.name or "-",
        info.kind,
        size(_taken(info)) + (", compressed" if info.compressed or info.image_compressed else ""),
        size(info.memory_bytes),
        duration(now - info.created_at),
        f"{duration(now - info.last_used_at)} ago",
        info.notebook or "-",
    )


def run_verify(arguments: argparse.Namespace) -> int:
    """Look at one after the other."""
    found: list[dict[str, object]] = []
    with _keeper() as keeper:
        answer = keeper.get("/snapshots")
        names: dict[str, str] = {one["id"]: one["name"] for one in answer["snapshots"]}
        broken = {one["id"]: one["error"] for one in answer["unreadable"]}
        for ref in arguments.snapshot or [*names, *broken]:
            listed = ref in names or ref in names.values()
            done = _verified(keeper, ref, broken.get(ref), listed=listed)
            found.append({"name": names.get(str(done["id"]), ""), **done})
            if not arguments.json:
                _print_verified(found[-1])
    if arguments.json:
        print_json({"snapshots": found})
    elif not found:
        print("No snapshots.")
    states = {str(one["state"]) for one in found}
    return DAMAGED if "damaged" in states else WARNING if "incomplete" in states else 0


def _verified(keeper: "SyncKeeperClient", ref: str, known: object, *, listed: bool) -> dict[str, object]:
    """What is found out about a snapshot; `known`: what was said of it that cannot even be read."""
    if known is not None:
        return {"id": ref, "state": "damaged", "error": known}
    try:
        done = keeper.post(f"/snapshots/{quote(ref, safe='')}/verify", timeout=None)
    except WarmcellError as error:
        if not listed or error.code not in DAMAGE:
            raise
        return {"id": ref, "state": "damaged", "error": error.to_json()}
    return {"id": done["id"], "state": "whole" if done["complete"] else "incomplete", "error": None}


def _print_verified(one: dict[str, object]) -> None:
    label = f"{one['id']}{f' ({name})' if (name := one['name']) else ''}"
    if one["state"] == "whole":
        print(f"{label}: as it was written")
    elif one["state"] == "incomplete":
        print(f"{label}: nothing is wrong, but not all of its checksums are there yet; verify it again in a minute")
    else:
        error = ErrorInfo.from_json(one["error"])  # type: ignore[arg-type] # as the keeper says it
        print(f"{label}: {error.message}")
        print_cure(error.hint)


def run_compress(arguments: argparse.Namespace) -> int:
    """Compress one after the other."""
    if bool(arguments.snapshot) == (arguments.older is not None):
        raise InvalidRequestError("Which snapshots is not said", hint="Name them, or say `--older 7d`.")
    done: list[dict[str, object]] = []
    with _keeper() as keeper:
        for ref in arguments.snapshot or _older(keeper, seconds(arguments.older)):
            try:
                before, after = _compressed(keeper, ref)
            except ConflictError as error:
                if arguments.snapshot:
                    raise
                print(f"{error.message}: passed over", file=sys.stderr)
                continue
            done.append(after.to_json())
            if not arguments.json:
                name = f" ({after.name})" if after.name else ""
                print(f"Compressed {after.id}{name}: {size(_taken(before))} before, {size(_taken(after))} now")
    if arguments.json:
        print_json({"snapshots": done})
    elif not done:
        print("Nothing to compress.")
    return 0


def _older(keeper: "SyncKeeperClient", age_s: float) -> list[str]:
    infos = [SnapshotInfo.from_json(one) for one in keeper.get("/snapshots")["snapshots"]]
    cold = [info for info in infos if info.last_used_at <= time.time() - age_s and info.kind not in PASSING]
    return [info.id for info in cold if not (info.compressed and info.image_compressed)]


def _compressed(keeper: "SyncKeeperClient", ref: str) -> tuple[SnapshotInfo, SnapshotInfo]:
    """Compress one, with a bar: what it was, and what it is."""
    path = f"/snapshots/{quote(ref, safe='')}"
    before = SnapshotInfo.from_json(keeper.get(path))
    after = before
    with contextlib.ExitStack() as shown:
        bar: Progress | None = None
        for line in keeper.lines(f"{path}/compress", {}):
            if "error" in line:
                raise from_json(line["error"])
            if "snapshot" in line:
                after = SnapshotInfo.from_json(line["snapshot"])
            else:
                bar = bar or shown.enter_context(Progress(f"Compressing {ref}", total=line["of"]))
                bar.add(line["done"] - bar.done)
    return before, after


def _taken(info: SnapshotInfo) -> int:
    return info.image_bytes + info.layer_bytes


def run_rm(arguments: argparse.Namespace) -> int:
    """Remove one after the other."""
    removed = []
    with _keeper() as keeper:
        for ref in arguments.snapshot:
            keeper.delete(f"/snapshots/{quote(ref, safe='')}?{urlencode({'force': int(arguments.force)})}")
            removed.append(ref)
            if not arguments.json:
                print(f"Removed {ref}")
    if arguments.json:
        print_json({"removed": removed})
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Write the file, whole or not at all."""
    target: Path = arguments.file
    part = target.with_name(f".{target.name}.part")
    path = (
        f"/snapshots/{quote(arguments.snapshot, safe='')}/export?{urlencode({'files_only': int(arguments.files_only)})}"
    )
    try:
        with _keeper() as keeper, _create(part) as file, Progress("Exported") as progress:
            for piece in keeper.download(path):
                file.write(piece)
                progress.add(len(piece))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except WarmcellError:
        raise  # A timeout is an OSError too.
    except OSError as error:
        raise _file_error(target, error, "written") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    if arguments.json:
        print_json({"file": str(target), "bytes": progress.done})
    else:
        print(f"Wrote {size(progress.done)} to {target}")
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    """Read the file."""
    try:
        with (
            open(arguments.file, "rb") as file,
            _keeper() as keeper,
            Progress("Imported", total=os.fstat(file.fileno()).st_size) as progress,
        ):
            path = f"/snapshots/import?{urlencode({'name': arguments.name})}"
            answer = keeper.upload(path, _pieces(file, progress))
    except WarmcellError:
        raise  # A timeout is an OSError too.
    except OSError as error:
        raise _file_error(arguments.file, error, "read") from error
    if arguments.json:
        print_json(answer)
    else:
        info = SnapshotInfo.from_json(answer)
        print(f"Imported {info.id}{f' ({info.name})' if info.name else ''}")
    return 0


def _keeper() -> "SyncKeeperClient":
    """The keeper; it is started if need be, for snapshots outlive it."""
    keeper = running_keeper(start=True)
    assert keeper is not None
    return keeper


def _create(path: Path) -> IO[bytes]:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb")


def _pieces(file: IO[bytes], progress: Progress) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        yield piece
        progress.add(len(piece))


def _file_error(path: Path, error: OSError, done: str) -> InvalidRequestError:
    return InvalidRequestError(f"{path} cannot be {done}: {error.strerror or error}", hint="Name another file.")
