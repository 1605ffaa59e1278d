"""Who has which GPU, across all users of the machine: one locked file per device.

A lease is an `flock` on a file named after the device's UUID, in a directory that all users share. The operating
system drops it when its holder dies, however that happens; what the file says is for people only. Who has a share of a
device has that file locked together with those who have the other shares, and a file of the share for itself. Whoever
waits has a ticket there, locked in the same way; its number says who came first. Processes that are parked and yet not
off their device are named in a file of that device, for as long as it is locked: they keep nobody from a lease.

A further file, `grants.lock`, is held for the moment of a grant or a look, so that two keepers which want several
devices each do not take half of them from one another.

Files are opened for writing only to be held, so whoever watches the directory (`watch`) hears of each lease and ticket
that ends, and of no look.
"""

import errno
import fcntl
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.gpus.allocator import Grant
from warmcell.sandbox.gpus.lease_files import GRANTS, NEW, LeaseFiles, lock, unusable
from warmcell.sandbox.gpus.notes import NOBODY_KNOWN, Holder, Sight, read_holder, read_staying, read_ticket
from warmcell.sandbox.gpus.queue import Ticket
from warmcell.sandbox.gpus.requests import GpuRequest
from warmcell.sandbox.models import SandboxId

_UUID = re.compile(r"(?:GPU|MIG)-[A-Za-z0-9-]{1,80}")
_SHARE = re.compile(rf"({_UUID.pattern})\.([0-9]+)-([0-9]+)\.lock")
_STAYS = re.compile(rf"({_UUID.pattern})\.stays-[0-9a-f]{{12}}\.lock")
_TICKET = re.compile(r"wait-([0-9]{12})-[a-z0-9_]{1,20}\.lock")
_OURS = re.compile(rf"{_UUID.pattern}\.lock|{_SHARE.pattern}|{_STAYS.pattern}|{_TICKET.pattern}|{re.escape(NEW)}.*")


class _Held:
    """Locked files, the last of which has a note. They are let go of with `release` or with this process."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._descriptors = list(descriptors)

    @property
    def held(self) -> bool:
        """Whether it has not been released."""
        return bool(self._descriptors)

    def release(self) -> None:
        """Let go. Idempotent."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in reversed(descriptors):
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            # Explicitly, since a copy of the descriptor in a forked child would keep the lock otherwise.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _write(self, note: dict[str, Any]) -> None:
        # A full disk takes the note, not the lock.
        with suppress(OSError):
            os.ftruncate(self._descriptors[-1], 0)
            os.pwrite(self._descriptors[-1], json.dumps(note).encode(), 0)


class Lease(_Held):
    """A device, or a share of one, that is held."""

    def __init__(self, uuid: str, descriptors: Sequence[int], holder: Holder) -> None:
        super().__init__(descriptors)
        self.uuid = uuid
        self.holder = holder
        self._tell()

    def move(self, to: SandboxId) -> None:
        """From now on another sandbox of this process holds it; there is no moment at which nobody does."""
        mine = self.holder
        self.holder = Holder(pid=mine.pid, uid=mine.uid, sandbox_id=to, since=mine.since, parts=mine.parts)
        self._tell()

    def _tell(self) -> None:
        mine = self.holder
        self._write({"pid": mine.pid, "uid": mine.uid, "sandbox_id": mine.sandbox_id, "since": mine.since})


class HeldTicket(_Held):
    """A place in the queue, for as long as it is held."""

    def __init__(self, ticket: Ticket, descriptor: int, path: Path) -> None:
        super().__init__([descriptor])
        self.ticket = ticket
        self._path = path

    def release(self) -> None:
        """Leave the queue. Idempotent."""
        if self.held:
            self._path.unlink(missing_ok=True)
        super().release()


class Remainder(_Held):
    """Processes that stay on a device which others may have."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__([descriptor])
        self._path = path

    def release(self) -> None:
        """They are strangers there again, unless they have a lease. Idempotent."""
        if self.held:
            self._path.unlink(missing_ok=True)
        super().release()


class LeaseDirectory(LeaseFiles):
    """The machine's leases, and who waits for one."""

    def acquire(
        self, uuids: Collection[str], choose: Callable[[Sight], Grant], *, holder: SandboxId
    ) -> tuple[Lease, ...]:
        """Lock some of `uuids`, all or none.

        Args:
            uuids: Devices that may be had.
            choose: Told who holds which of them, and who waits, it says what to lock; nothing that is held. What it
                raises is raised here, and nothing is locked then.
            holder: The sandbox that the leases are for.

        Raises:
            BackendUnavailableError: The directory cannot be used.
            OperationTimeoutError: Another keeper has been granting for too long.
        """
        self._make()
        with self._granting() as present, ExitStack() as undo:
            assert present
            sight = self._look(uuids)
            grant = choose(sight)
            note = Holder(pid=os.getpid(), uid=os.getuid(), sandbox_id=holder, since=time.time(), parts=grant.parts)
            leases = []
            for device in grant.devices:
                lease = Lease(device.uuid, self._take(device.uuid, grant.parts), note)
                undo.callback(lease.release)
                leases.append(lease)
            undo.pop_all()
            return tuple(leases)

    def look(self, uuids: Collection[str]) -> Sight:
        """Who holds which of these devices, and who waits for any. Makes nothing.

        Raises:
            BackendUnavailableError: The directory cannot be used.
            OperationTimeoutError: Another keeper has been granting for too long.
        """
        with self._granting() as present:
            return self._look(uuids) if present else Sight({})

    def enqueue(self, request: GpuRequest, *, holder: SandboxId) -> HeldTicket:
        """Come last in the queue.

        Raises:
            BackendUnavailableError: The directory cannot be used.
            OperationTimeoutError: Another keeper has been granting for too long.
        """
        self._make()
        with self._granting() as present:
            assert present
            numbers = [int(found[1]) for name in self._names() if (found := _TICKET.fullmatch(name))]
            ticket = Ticket(
                number=max(numbers, default=0) + 1,
                request=request,
                sandbox_id=holder,
                pid=os.getpid(),
                uid=os.getuid(),
                since=time.time(),
            )
            return self._put(ticket)

    def leave_behind(self, uuid: str, pids: Collection[int]) -> Remainder:
        """Say of processes that they do nothing on a device, though the driver lists them there.

        Raises:
            BackendUnavailableError: The directory cannot be used.
        """
        self._make()
        _file_name(uuid)
        path = self.path / f"{uuid}.stays-{os.urandom(6).hex()}.lock"
        return Remainder(self._linked(path, {"pid": os.getpid(), "stay": sorted(pids)}), path)

    def remove_stale(self) -> tuple[str, ...]:
        """Remove the files of leases that nobody holds, as far as they are this user's; with the last, the directory.

        Returns:
            The paths that are gone.

        Raises:
            BackendUnavailableError: The directory cannot be used.
            OperationTimeoutError: Another keeper has been granting for too long.
        """
        gone: list[str] = []
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return ()
        with self._granting() as present:
            assert present
            for entry in sorted(self.path.iterdir()):
                if _OURS.fullmatch(entry.name) and self._remove_if_free(entry):
                    gone.append(str(entry))
            with suppress(OSError):
                if [entry.name for entry in self.path.iterdir()] == [GRANTS]:
                    (self.path / GRANTS).unlink()
                    gone.append(str(self.path / GRANTS))
                    if self._could_be_made_again():
                        self.path.rmdir()
                        gone.append(str(self.path))
        return tuple(gone)

    def _could_be_made_again(self) -> bool:
        """Whether the next user who needs it may make it; else an administrator did, for all."""
        return bool(self.path.parent.stat().st_mode & stat.S_IWOTH) or os.getuid() != 0

    def _remove_if_free(self, entry: Path) -> bool:
        # Only while it is locked here: whoever waits for it sees afterwards that it is no longer the file.
        with suppress(OSError, BackendUnavailableError):
            descriptor = self._open(entry.name, create=False)
            try:
                if lock(descriptor):
                    entry.unlink()
                    return True
            finally:
                os.close(descriptor)
        return False

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except OSError as error:
            raise unusable(self.path, error) from error

    def _look(self, uuids: Collection[str]) -> Sight:
        names = self._names()
        holders = {uuid: found for uuid in uuids if (found := self._holders(uuid, names))}
        tickets = [ticket for name in names if (ticket := self._ticket(name)) is not None]
        staying: dict[str, frozenset[int]] = {}
        for name in names:
            if (of := _STAYS.fullmatch(name)) and of[1] in uuids:
                staying[of[1]] = staying.get(of[1], frozenset()) | self._staying(name)
        return Sight(holders, tuple(sorted(tickets, key=lambda ticket: ticket.number)), staying)

    def _staying(self, name: str) -> frozenset[int]:
        with suppress(BackendUnavailableError), self._opened(name) as descriptor:
            if descriptor is not None and not lock(descriptor):
                return read_staying(descriptor)
            with suppress(OSError):  # Its keeper was killed, and these processes with it.
                os.unlink(self.path / name)
        return frozenset()

    def _holders(self, uuid: str, names: Sequence[str]) -> tuple[Holder, ...]:
        name = _file_name(uuid)
        with self._opened(name) as descriptor:
            if descriptor is None or lock(descriptor):
                return ()
            if not lock(descriptor, fcntl.LOCK_SH):
                return (read_holder(descriptor),)
        shares = []
        for found in filter(None, map(_SHARE.fullmatch, names)):
            if found[1] == uuid:
                # What anybody may have put there in the place of a share's file says nothing of other devices.
                with suppress(BackendUnavailableError), self._opened(found[0]) as descriptor:
                    if descriptor is not None and not lock(descriptor):
                        shares.append(read_holder(descriptor, parts=int(found[2])))
        # Somebody who is just ending may have the device still, and the share no more.
        return tuple(shares) or (NOBODY_KNOWN,)

    def _ticket(self, name: str) -> Ticket | None:
        found = _TICKET.fullmatch(name)
        if found is None:
            return None
        try:
            with self._opened(name) as descriptor:
                if descriptor is None:
                    return None
                if not lock(descriptor):
                    return read_ticket(descriptor, int(found[1]))
        except BackendUnavailableError:  # Somebody has put something else there.
            return None
        with suppress(OSError):  # Its keeper was killed. Another user's is not ours to remove.
            os.unlink(self.path / name)
        return None

    @contextmanager
    def _opened(self, name: str) -> Iterator[int | None]:
        """To be looked at; None where there is no such file, or no plain one."""
        try:
            descriptor = self._open(name, create=False, flags=os.O_RDONLY)
        except FileNotFoundError:
            yield None
            return
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _take(self, uuid: str, parts: int) -> list[int]:
        """Lock a device, or the first free share of it."""
        device = self._locked(_file_name(uuid), fcntl.LOCK_EX if parts == 1 else fcntl.LOCK_SH)
        if device is not None and parts == 1:
            return [device]
        if device is not None:
            with ExitStack() as undo:
                undo.callback(os.close, device)
                for n in range(parts):
                    share = self._locked(f"{uuid}.{parts}-{n}.lock", fcntl.LOCK_EX)
                    if share is not None:
                        undo.pop_all()
                        return [device, share]
        raise unusable(self.path / _file_name(uuid), OSError(errno.EBUSY, "somebody holds it who asks nobody"))

    def _locked(self, name: str, how: int) -> int | None:
        descriptor = self._open(name, create=True)
        if lock(descriptor, how):
            return descriptor
        os.close(descriptor)
        return None

    def _put(self, ticket: Ticket) -> HeldTicket:
        """A file that is locked, and says what it is, before anybody sees it."""
        path = self.path / f"wait-{ticket.number:012d}-{os.urandom(6).hex()}.lock"
        note = {
            "pid": ticket.pid,
            "uid": ticket.uid,
            "sandbox_id": ticket.sandbox_id,
            "since": ticket.since,
            "request": ticket.request.canonical,
        }
        return HeldTicket(ticket, self._linked(path, note), path)

    def _linked(self, path: Path, note: dict[str, Any]) -> int:
        try:
            descriptor, made = tempfile.mkstemp(dir=self.path, prefix=NEW)
            try:
                os.fchmod(descriptor, 0o644)
                lock(descriptor)
                os.pwrite(descriptor, json.dumps(note).encode(), 0)
                os.link(made, path)
            except BaseException:
                os.close(descriptor)
                raise
            finally:
                os.unlink(made)
        except OSError as error:
            raise unusable(path, error) from error
        return descriptor


def _file_name(uuid: str) -> str:
    if _UUID.fullmatch(uuid) is None:
        raise BackendUnavailableError(
            f"{uuid!r} is no GPU UUID that a lease could be named after",
            hint="See what `nvidia-smi -L` lists, and whether the driver is the one that belongs to it.",
        )
    return f"{uuid}.lock"
