"""GPU leases between real processes: exclusion, and release by the operating system."""

import asyncio
import fcntl
import json
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OrdinaryUser
from tests.leaks import Places
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    ConflictError,
    InvalidRequestError,
    NoGpuAvailableError,
    OperationTimeoutError,
    UnknownGpuKindError,
)
from warmcell.sandbox.gpus.allocator import Grant
from warmcell.sandbox.gpus.base import GpuProcess
from warmcell.sandbox.gpus.lease_files import GRANTS
from warmcell.sandbox.gpus.leases import Lease, LeaseDirectory
from warmcell.sandbox.gpus.notes import Holder
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.models import GpuDevice, SandboxId

KINDS = [{"name": "A100-SXM4-80GB", "memory": "80GiB", "count": 2}, {"name": "T4", "memory": "16GiB"}]

# A keeper of its own: leases what its first argument says, tells what it got, and holds it until its stdin ends.
KEEPER = f"""
import asyncio, json, pathlib, sys
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory

async def main(request, directory):
    pool = GpuPool(SimulatedInventory({KINDS!r}), LeaseDirectory(pathlib.Path(directory)))
    try:
        told = {{"uuids": [d.uuid for d in await pool.lease(request, holder="elsewhere")]}}
    except WarmcellError as error:
        told = error.to_json()
    print(json.dumps(told), flush=True)
    sys.stdin.read()

asyncio.run(main(*sys.argv[1:]))
"""

ONE, TWO, THREE = SandboxId("one"), SandboxId("two"), SandboxId("three")


def pool_in(directory: Path) -> GpuPool:
    return GpuPool(SimulatedInventory(KINDS), LeaseDirectory(directory))


@pytest.fixture
def pool(places: Places) -> Iterator[GpuPool]:
    pool = pool_in(places.leases)
    yield pool
    pool.close()


class OtherKeeper:
    """A keeper in a process of its own, and what it said about its lease."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline() if select.select([process.stdout], [], [], 30)[0] else ""
        self.told: dict[str, Any] = json.loads(line)


@contextmanager
def other_keeper(
    request: str, directory: Path, *, argv: list[str] | None = None, env: Mapping[str, str] | None = None
) -> Iterator[OtherKeeper]:
    command = argv or [sys.executable, "-c", KEEPER, request, str(directory)]
    process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        try:
            yield OtherKeeper(process)
        finally:
            process.kill()


@contextmanager
def forked_child() -> Iterator[None]:
    """A copy of this process, descriptors and all, that waits."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        yield
    finally:
        os.close(read)
        os.close(write)
        os.waitpid(pid, 0)


async def test_a_lease_is_exclusive_within_a_keeper(pool: GpuPool) -> None:
    """Two sandboxes get two devices, the third is told who has them, and a release lets it in."""
    first, second = await pool.lease("A100", holder=ONE), await pool.lease("A100", holder=TWO)
    assert first[0].uuid != second[0].uuid
    with pytest.raises(NoGpuAvailableError, match=r"GPU 0 by sandbox one; GPU 1 by sandbox two"):
        await pool.lease("A100", holder=THREE)
    pool.release(ONE)
    assert await pool.lease("A100", holder=THREE) == first


async def test_many_at_once_get_each_device_once(pool: GpuPool) -> None:
    """Requests that race for three devices: three win, with one each."""
    asked = (pool.lease("any", holder=SandboxId(f"s{n}")) for n in range(12))
    answers = await asyncio.gather(*asked, return_exceptions=True)
    won = [answer[0].uuid for answer in answers if isinstance(answer, tuple)]
    assert len(won) == len(set(won)) == 3
    assert sum(isinstance(answer, NoGpuAvailableError) for answer in answers) == 9


async def test_a_lease_is_exclusive_between_keepers(pool: GpuPool, places: Places) -> None:
    """What another process holds is not granted here, and the error says which user and keeper has it."""
    with other_keeper("A100:2", places.leases) as other:
        assert len(other.told["uuids"]) == 2
        with pytest.raises(NoGpuAvailableError) as caught:
            await pool.lease("A100", holder=ONE)
        assert f"(keeper {other.process.pid})" in caught.value.message
        row = (await pool.status())[0]
        assert row["lease"] | {"since": 0} == {
            "sandbox_id": "elsewhere",
            "mine": False,
            "user": row["lease"]["user"],
            "pid": other.process.pid,
            "since": 0,
            "parts": 1,
        }


async def test_a_killed_keeper_holds_nothing(pool: GpuPool, places: Places) -> None:
    """After kill -9 of its holder a device can be leased at once, and no trace of the old lease is shown."""
    with other_keeper("any:3", places.leases) as other:
        with pytest.raises(NoGpuAvailableError):
            await pool.lease("T4", holder=ONE)
        other.process.send_signal(signal.SIGKILL)
        other.process.wait(timeout=60)
        assert [row["lease"] for row in await pool.status()] == [None, None, None]
        assert len(await pool.lease("any:3", holder=ONE)) == 3


async def test_several_devices_come_together_or_not_at_all(places: Places) -> None:
    """Keepers that race for both devices of a kind: one has both, none has half, whoever loses holds nothing."""
    with (
        other_keeper("A100:2", places.leases) as a,
        other_keeper("A100:2", places.leases) as b,
        other_keeper("A100:2", places.leases) as c,
    ):
        told = [keeper.told for keeper in (a, b, c)]
        assert sorted(len(one.get("uuids", ())) for one in told) == [0, 0, 2]
        assert sorted(one.get("code", "") for one in told) == ["", "no_gpu_available", "no_gpu_available"]


async def test_no_child_inherits_a_lease(pool: GpuPool, places: Places) -> None:
    """A process that is started while a lease is held has no descriptor of it, so the release is real."""
    await pool.lease("any:3", holder=ONE)
    look = "import os\nfor n in range(3, 1024):\n try: print(os.readlink(f'/proc/self/fd/{n}'))\n except OSError: pass"
    child = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", look], close_fds=False, capture_output=True, text=True, timeout=30
    )
    assert child.returncode == 0
    assert str(places.leases) not in child.stdout


async def test_a_release_holds_though_a_forked_child_has_the_descriptor(pool: GpuPool) -> None:
    """A fork without exec copies descriptors; a released device is free all the same."""
    await pool.lease("any:3", holder=ONE)
    with forked_child():
        pool.release(ONE)
        assert len(await pool.lease("any:3", holder=TWO)) == 3


async def test_release_is_idempotent_and_unknown_holders_are_fine(pool: GpuPool) -> None:
    """Cleaning up twice, or after a start that never got so far, is no error."""
    await pool.lease("T4", holder=ONE)
    pool.release(ONE)
    pool.release(ONE)
    pool.release(TWO)
    assert [row["lease"] for row in await pool.status()] == [None, None, None]


async def test_a_lease_moves_to_another_sandbox_without_a_gap(pool: GpuPool, places: Places) -> None:
    """The device stays locked all the time, and from then on the new sandbox is the one that holds it."""
    device = (await pool.lease("T4", holder=ONE))[0]
    pool.move(ONE, TWO)
    pool.release(ONE)
    row = next(row for row in await pool.status() if row["uuid"] == device.uuid)
    assert (row["lease"]["sandbox_id"], row["lease"]["mine"]) == ("two", True)
    with other_keeper("T4", places.leases) as other:
        assert "sandbox two of user" in other.told["message"]
    pool.release(TWO)
    assert await pool.lease("T4", holder=THREE)


async def test_a_move_from_nobody_is_nothing_and_onto_a_holder_is_refused(pool: GpuPool) -> None:
    """A CPU sandbox that restarts has nothing to move; two leases are never mixed."""
    pool.move(THREE, TWO)
    await pool.lease("T4", holder=ONE)
    await pool.lease("A100", holder=TWO)
    with pytest.raises(ConflictError):
        pool.move(ONE, TWO)
    with pytest.raises(ConflictError):
        await pool.lease("A100", holder=ONE)


async def test_check_tells_what_can_never_be_and_lets_busy_pass(pool: GpuPool) -> None:
    """A form can be checked before a start; that a device is busy now is not its business."""
    await pool.lease("any:3", holder=ONE)
    await pool.check("A100:2")
    with pytest.raises(UnknownGpuKindError):
        await pool.check("H100")
    with pytest.raises(InvalidRequestError, match="this machine has 2"):
        await pool.check("A100:3")
    with pytest.raises(InvalidRequestError):
        await pool.check("A100:")


async def test_looking_makes_no_directory(places: Places) -> None:
    """A machine on which nobody leases a GPU gets no lease directory from being looked at."""
    directory = places.root / "none"
    pool = pool_in(directory)
    assert [row["lease"] for row in await pool.status()] == [None, None, None]
    assert not directory.exists()


async def test_the_directory_is_for_all_users(places: Places) -> None:
    """It is made as /tmp is: everybody may lock, nobody removes another's file; whatever the umask."""
    before = os.umask(0o077)
    pool = pool_in(places.root / "shared")
    try:
        await pool.lease("T4", holder=ONE)
        directory = places.root / "shared"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o1777
        assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o666}
        assert len(list(directory.iterdir())) == 2
    finally:
        os.umask(before)
        pool.close()


@pytest.mark.root
@pytest.mark.user
async def test_a_lease_is_exclusive_between_users(places: Places, ordinary_user: OrdinaryUser) -> None:
    """Root and an ordinary user share the files, whoever made them, and each sees the other by name."""
    directory = places.root / "shared"
    places.root.chmod(0o755)
    pool = pool_in(directory)
    command = ordinary_user.argv(sys.executable, "-c", KEEPER, "T4", str(directory))
    try:
        await pool.lease("A100", holder=ONE)
        with other_keeper("", directory, argv=command, env=ordinary_user.env) as other:
            assert len(other.told["uuids"]) == 1
            with pytest.raises(NoGpuAvailableError, match=f"sandbox elsewhere of user {ordinary_user.uid}"):
                await pool.lease("T4", holder=TWO)
        await pool.lease("T4", holder=TWO)
        with other_keeper("", directory, argv=command, env=ordinary_user.env) as other:
            assert "sandbox two of user root" in other.told["message"]
    finally:
        pool.close()


async def test_stale_files_are_removed_and_held_ones_are_not(pool: GpuPool, places: Places) -> None:
    """`clean` takes what nobody holds; a lease that is held stays, and with the last one goes the rest."""
    directory = LeaseDirectory(places.leases)
    await pool.lease("T4", holder=ONE)
    await pool.lease("A100:2", holder=TWO)
    pool.release(TWO)
    (places.leases / ".warmcell-new-left").touch()
    (places.leases / "somebody-elses").touch()
    gone = [Path(path).name for path in await asyncio.to_thread(directory.remove_stale)]
    assert len(gone) == 3
    assert ".warmcell-new-left" in gone
    assert len(list(places.leases.glob("GPU-*.lock"))) == 1
    pool.release(ONE)
    (places.leases / "somebody-elses").unlink()
    await asyncio.to_thread(directory.remove_stale)
    assert list(places.leases.glob("*")) == []
    assert await asyncio.to_thread(directory.remove_stale) == ()


async def test_a_grant_survives_a_clean_in_between(pool: GpuPool, places: Places) -> None:
    """Removing files never lets two have one device: a lease on a new file excludes, and is seen."""
    await pool.lease("T4", holder=ONE)
    directory = LeaseDirectory(places.leases)
    await asyncio.to_thread(directory.remove_stale)
    with pytest.raises(NoGpuAvailableError):
        await pool_in(places.leases).lease("T4", holder=TWO)
    pool.release(ONE)
    await asyncio.to_thread(directory.remove_stale)
    await pool.lease("T4", holder=TWO)
    with pytest.raises(NoGpuAvailableError):
        await pool_in(places.leases).lease("T4", holder=THREE)


async def test_a_lock_on_a_file_that_was_cleaned_away_counts_for_nothing(places: Places) -> None:
    """Whoever opened `grants.lock` just before it was replaced waits for the new one like everybody else."""

    class Overtaken(LeaseDirectory):
        """Between its open and its lock, somebody cleans up and starts a grant."""

        rival = -1

        def _open(self, name: str, *, create: bool, flags: int = os.O_RDWR) -> int:
            descriptor = super()._open(name, create=create, flags=flags)
            if name == GRANTS and self.rival < 0:
                (self.path / GRANTS).unlink()
                self.rival = super()._open(name, create=True)
                fcntl.flock(self.rival, fcntl.LOCK_EX)
            return descriptor

    directory = Overtaken(places.leases, timeout=0.1)
    with pytest.raises(OperationTimeoutError):
        await GpuPool(SimulatedInventory(KINDS), directory).lease("T4", holder=ONE)
    os.close(directory.rival)


@pytest.mark.parametrize("note", [b"", b"garbage", b"[]", b'{"pid": "x"}', b"\xff" * 10000])
async def test_an_unreadable_note_is_no_free_device(places: Places, note: bytes) -> None:
    """The lock decides, not what the file says; whoever cannot be read is somebody unknown."""
    inventory = SimulatedInventory(KINDS)
    device = (await inventory.devices())[2]
    uuid, directory = device.uuid, LeaseDirectory(places.leases)
    leases = await asyncio.to_thread(directory.acquire, [uuid], lambda sight: Grant((device,)), holder=ONE)
    (places.leases / f"{uuid}.lock").write_bytes(note)
    try:
        with pytest.raises(NoGpuAvailableError, match="by somebody unknown"):
            await pool_in(places.leases).lease("T4", holder=TWO)
    finally:
        leases[0].release()


@pytest.mark.parametrize("trap", ["symlink", "fifo", "directory"])
async def test_a_trap_in_the_shared_directory_is_refused(places: Places, trap: str) -> None:
    """In a directory that others write to, nothing but a plain file is opened, and nothing hangs."""
    uuid = (await SimulatedInventory(KINDS).devices())[2].uuid
    path, victim = places.leases / f"{uuid}.lock", places.root / "victim"
    victim.write_text("untouched")
    if trap == "symlink":
        path.symlink_to(victim)
    elif trap == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    try:
        with pytest.raises(BackendUnavailableError, match="WARMCELL_LEASE_DIR"):
            await pool_in(places.leases).lease("T4", holder=ONE)
    finally:
        path.rmdir() if trap == "directory" else path.unlink()
    assert victim.read_text() == "untouched"


def test_a_share_that_is_no_file_keeps_no_device(places: Places) -> None:
    """Nothing of what was locked on the way to it stays so, in the keeper that goes on."""
    leases = LeaseDirectory(places.leases)
    device = GpuDevice(uuid="GPU-1", index=0, name="T4", memory_total_bytes=1)
    leases.look(["GPU-1"])
    places.leases.mkdir(exist_ok=True)
    (places.leases / "GPU-1.2-0.lock").mkdir()
    with pytest.raises(BackendUnavailableError, match=r"GPU-1\.2-0\.lock cannot be used"):
        leases.acquire(["GPU-1"], lambda sight: Grant((device,), 2), holder=ONE)
    assert leases.look(["GPU-1"]).holders == {}
    (places.leases / "GPU-1.2-0.lock").rmdir()


def test_a_share_that_is_no_file_ends_nobody_elses_leasing(places: Places) -> None:
    """Anybody may put something there, and others share that GPU meanwhile."""
    leases = LeaseDirectory(places.leases)
    one, other = (GpuDevice(uuid=f"GPU-{n}", index=n, name="T4", memory_total_bytes=1) for n in (1, 2))
    held = leases.acquire(["GPU-1"], lambda sight: Grant((one,), 2), holder=ONE)
    (places.leases / "GPU-1.2-1.lock").mkdir()
    sight = LeaseDirectory(places.leases).look(["GPU-1", "GPU-2"])
    assert [holder.sandbox_id for holder in sight.holders["GPU-1"]] == [ONE]
    more = leases.acquire(["GPU-1", "GPU-2"], lambda sight: Grant((other,), 1), holder=TWO)
    for lease in (*held, *more):
        lease.release()
    (places.leases / "GPU-1.2-1.lock").rmdir()


async def test_a_directory_that_is_none_is_refused_with_the_cure(places: Places) -> None:
    """A file in the directory's place gives one typed error with the one root command."""
    blocked = places.root / "file"
    blocked.touch()
    with pytest.raises(BackendUnavailableError, match="install -d -m 1777"):
        await pool_in(blocked).lease("T4", holder=ONE)


@pytest.mark.user
async def test_a_directory_that_may_not_be_written_is_told_with_the_cure(
    places: Places, ordinary_user: OrdinaryUser
) -> None:
    """To a user whom root's directory keeps out: neither a lease nor a place in the queue, at once."""
    if os.getuid() != 0:
        pytest.skip("only root can make a directory that keeps its maker's neighbours out")
    places.root.chmod(0o755)
    directory = places.root / "closed"
    directory.mkdir(mode=0o755)
    command = ordinary_user.argv(sys.executable, "-c", KEEPER, "T4", str(directory))
    with other_keeper("", directory, argv=command, env=ordinary_user.env) as other:
        assert other.told["code"] == "backend_unavailable"
        assert f"install -d -m 1777 {directory}" in other.told["hint"]


async def test_a_grant_that_hangs_elsewhere_ends_in_a_typed_error(places: Places) -> None:
    """A keeper that is stopped in the middle of a grant costs others their deadline, not for ever."""
    with other_keeper("T4", places.leases):
        pass
    hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print('{}', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(places.leases / GRANTS)]
    with other_keeper("", places.leases, argv=command):
        slow = LeaseDirectory(places.leases, timeout=0.1)
        with pytest.raises(OperationTimeoutError, match="fuser"):
            await GpuPool(SimulatedInventory(KINDS), slow).lease("T4", holder=ONE)


async def test_a_cancelled_lease_leaves_nothing_locked(places: Places) -> None:
    """Whenever the caller goes away during a grant, the device is free afterwards."""

    class Slow(LeaseDirectory):
        """Tells when the lock is taken, and dawdles then."""

        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.loop = asyncio.get_running_loop()
            self.locked = asyncio.Event()
            self.go_on = asyncio.Event()

        def acquire(self, uuids: Collection[str], choose: Any, *, holder: SandboxId) -> tuple[Lease, ...]:
            leases = super().acquire(uuids, choose, holder=holder)
            self.loop.call_soon_threadsafe(self.locked.set)
            asyncio.run_coroutine_threadsafe(self.go_on.wait(), self.loop).result(10)
            return leases

    slow = Slow(places.leases)
    pool = GpuPool(SimulatedInventory(KINDS), slow)
    task = asyncio.create_task(pool.lease("T4", holder=ONE))
    await asyncio.wait_for(slow.locked.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    slow.go_on.set()
    other = pool_in(places.leases)
    async with asyncio.timeout(60):
        while True:
            try:
                await other.lease("T4", holder=TWO)
                break
            except NoGpuAvailableError:
                continue
    other.close()
    await pool.lease("A100", holder=ONE)
    pool.close()


class Occupied(SimulatedInventory):
    """Devices on some of which somebody computes without a lease."""

    def __init__(self, *busy: int) -> None:
        super().__init__(KINDS)
        self.busy = busy
        self.strangers: tuple[GpuProcess, ...] = (
            GpuProcess(pid=4711, user="eve", command="python"),
            GpuProcess(pid=4712),
        )

    async def processes(self, device: GpuDevice) -> tuple[GpuProcess, ...]:
        return self.strangers if device.index in self.busy else ()


async def test_a_device_on_which_a_stranger_computes_is_passed_over(places: Places) -> None:
    """Programs outside Warmcell are respected: another device is given, and the busy one is not kept locked."""
    pool = GpuPool(Occupied(0), LeaseDirectory(places.leases))
    assert [d.index for d in await pool.lease("A100", holder=ONE)] == [1]
    with pytest.raises(NoGpuAvailableError) as caught:
        await pool.lease("A100", holder=TWO)
    assert "GPU 0 by process 4711 (python, user eve) and 1 more, outside Warmcell" in caught.value.message
    assert "GPU 1 by sandbox one" in caught.value.message
    assert [row["lease"] is None for row in await pool.status()] == [True, False, True]
    pool.close()


async def test_who_is_parked_and_could_not_leave_is_no_stranger(places: Places) -> None:
    """Every keeper of the machine hears of it, until its own keeper ends or it has its lease again."""
    inventory = Occupied()
    mine, others = (GpuPool(inventory, LeaseDirectory(places.leases)) for _ in range(2))
    inventory.strangers = (GpuProcess(pid=os.getpid(), command="python"),)
    device = (await inventory.devices())[0]
    await mine.lease(device.uuid, holder=ONE)
    inventory.busy = (0,)
    await mine.leave_behind(ONE, [os.getpid(), 4711, 1])
    await others.lease(device.uuid, holder=TWO)
    with pytest.raises(NoGpuAvailableError):
        await mine.lease(device.uuid, holder=ONE)
    others.release(TWO)
    await mine.lease(device.uuid, holder=ONE)
    mine.release(ONE)
    with pytest.raises(NoGpuAvailableError, match=f"process {os.getpid()}"):
        await others.lease(device.uuid, holder=TWO)
    assert not list(places.leases.glob("*.stays-*"))
    mine.close()
    others.close()


@pytest.mark.root
async def test_nobody_makes_another_users_program_pass_for_parked(places: Places) -> None:
    """The file counts for processes of whoever wrote it: all users can write there."""
    inventory = Occupied(0)
    with subprocess.Popen(["sleep", "60"]) as program:
        inventory.strangers = (GpuProcess(pid=program.pid, command="sleep"),)
        pool = GpuPool(inventory, LeaseDirectory(places.leases))
        device = (await inventory.devices())[0]
        remainder = LeaseDirectory(places.leases).leave_behind(device.uuid, [program.pid])
        (named,) = places.leases.glob("*.stays-*")
        os.chown(named, 54321, 54321)
        with pytest.raises(NoGpuAvailableError, match=f"process {program.pid}"):
            await pool.lease(device.uuid, holder=ONE)
        os.chown(named, 0, 0)
        await pool.lease(device.uuid, holder=ONE)
        remainder.release()
        pool.close()
        program.kill()


async def test_strangers_on_all_devices_end_the_search(places: Places) -> None:
    """With every device taken by others there is an end, with each of them named, and nothing is locked."""
    pool = GpuPool(Occupied(0, 1, 2), LeaseDirectory(places.leases))
    with pytest.raises(NoGpuAvailableError) as caught:
        await pool.lease("any", holder=ONE)
    assert len(caught.value.details["held"]) == 3
    assert [row["lease"] for row in await pool.status()] == [None, None, None]


def test_a_holder_is_told_by_name() -> None:
    """One's own sandbox by its id alone, another's with user and keeper."""
    mine = Holder(pid=os.getpid(), uid=os.getuid(), sandbox_id="abc", since=1.0)
    other = Holder(pid=1, uid=0, sandbox_id="abc", since=1.0)
    nameless = Holder(pid=1, uid=54321, sandbox_id="abc", since=1.0)
    assert str(mine) == "sandbox abc"
    assert str(other) == "sandbox abc of user root (keeper 1)"
    assert "user 54321" in str(nameless)
    assert other.to_json(mine=False) == {"sandbox_id": "abc", "since": 1.0, "mine": False, "user": "root", "pid": 1} | {
        "parts": 1
    }
