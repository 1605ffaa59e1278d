"""Whatever is killed in the middle of whatever: the old state is there, or said to be gone, and nothing is left."""

import asyncio
import contextlib
import os
import random
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.keeper.conftest import until
from tests.integration.snapshots.notebooks import Notebook, configure, end_all, keeper, notebook, page, processes_of
from tests.integration.snapshots.server_trials import server_killed
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import TransportError, WarmcellError
from warmcell.sandbox.paths import Paths

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

VERBS = ("suspend", "resume", "snapshot", "restore", "fork")
WISHES: dict[str, dict[str, Any]] = {"restore": {"snapshot": "old"}, "fork": {"n": 2}}
VICTIMS = ("keeper", "guest", "criu", "helper", "server")
KEEPER_IDLE_S = 5.0
LONGEST_S = 0.3
"""About as long as any of the verbs takes."""

SHELVED = re.compile(r"/[.]?[a-z0-9]{12}$")
"""A sandbox, a snapshot, a draft of one or an image."""

CRIU_S = 0.05
"""About as long as CRIU runs."""

LOOK_S = 0.003

THREADS = """
import threading, time
sleeping = [threading.Thread(target=lambda: [time.sleep(0.01) for _ in range(100_000)], daemon=True) for _ in range(4)]
waiting = [threading.Thread(target=threading.Event().wait, args=wait, daemon=True) for wait in ((), (500,), (600,))]
counting = threading.Thread(target=lambda: [sum(range(99)) for _ in iter(int, 1)], daemon=True)
threads = [*sleeping, *waiting, counting]
for each in threads:
    each.start()
"""

CELL = "x += 1; data[x] = 1; print(x, sum(data), open('/tmp/file').read())"


def descendants(pid: int) -> dict[int, str]:
    """Host pids and names of the processes below one; a program that was run from memory has its first argument's."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError):
            head, _, rest = Path(f"/proc/{entry}/stat").read_text().rpartition(")")
            named = Path(f"/proc/{entry}/cmdline").read_bytes().startswith(b"criu\0")
            parents[int(entry)] = int(rest.split()[1])
            names[int(entry)] = "criu" if named else head.partition("(")[2]
    found: dict[int, str] = {}
    for one in parents:
        above = one
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and one != pid:
            found[one] = names[one]
    return found


def stopped(places: Places) -> list[int]:
    """Processes of guests that somebody has frozen."""
    found = []
    for pid in processes_of(places):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt":
                found.append(pid)
    return found


def inner_pid(pid: int) -> int:
    """The number of a process in its own pid namespace; 0 of one that has ended."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("NSpid:")).split()[-1])
    return 0


class Trials:
    """A keeper, replaced when it was killed, and what each trial does with it."""

    def __init__(self, places: Places, workspace: Path) -> None:
        self.places = places
        self.workspace = workspace
        self.paths = Paths.default()

    async def run(self, seed: int) -> str:
        """One trial; what happened, in short."""
        moments = random.Random(seed)
        verb, victim = VERBS[seed % len(VERBS)], VICTIMS[(seed // len(VERBS)) % len(VICTIMS)]
        if victim == "server":
            wish = WISHES.get(verb, {})
            outcome = await server_killed(self.places, verb, wish, moments, longest_s=LONGEST_S)
            configure(self.places, keeper_idle_s=KEEPER_IDLE_S)
        else:
            outcome = await self._kill(verb, victim, moments)
        async with await KeeperClient.connect() as client:
            await end_all(client)
            for info in (await client.get("/snapshots"))["snapshots"]:
                await client.delete(f"/snapshots/{info['id']}?force=1")
            await self._nothing_left(client)
        return outcome

    async def _kill(self, verb: str, victim: str, moments: random.Random) -> str:
        """A notebook of the keeper's own, in the middle of whose verb the victim is killed."""
        async with await KeeperClient.connect() as client, notebook(client, self.workspace) as made:
            await made.run("x, data = 0, bytearray(1 << 22); open('/tmp/file', 'w').write('kept')")
            await made.run(THREADS if victim == "criu" else "")
            await made.do("snapshot", name="old")
            assert await made.run(CELL) == "1 1 kept"
            if verb == "resume":
                await made.do("suspend")
            outcome = await self.disturbed(made, verb, victim, moments)
            if victim == "keeper":
                where = await self._next_keeper(made)
            else:
                await self._same_keeper(made, verb, victim, outcome)
                where = "same"
        ended = f"{type(outcome).__name__}: {outcome.message}" if isinstance(outcome, WarmcellError) else "done"
        return f"{verb}, {victim} killed: {ended}, {where}"

    async def disturbed(
        self, made: Notebook, verb: str, victim: str, moments: random.Random
    ) -> dict[str, Any] | WarmcellError:
        """What became of the verb, in the middle of which the victim was killed."""
        keeper = int((await made.keeper.get("/status"))["pid"])
        doing = asyncio.create_task(made.do(verb, **WISHES.get(verb, {})))
        if victim != "criu":
            await asyncio.wait({doing}, timeout=moments.uniform(0.0, LONGEST_S))
        while True:
            below = descendants(keeper)
            pids = {
                "keeper": [keeper],
                "guest": processes_of(self.places),
                "criu": [pid for pid, name in below.items() if name == "criu"],
                "helper": [pid for pid, name in below.items() if name in ("warmcell-helper", "warmcell-work")],
            }[victim]
            if pids or doing.done():
                break
            await asyncio.sleep(0.001)
        if victim == "criu":
            await asyncio.sleep(moments.uniform(0.0, CRIU_S))
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(moments.choice(pids), signal.SIGKILL)
        try:
            return await doing
        except WarmcellError as error:
            assert error.message, error
            assert error.hint or isinstance(error, TransportError), repr(error)
            return error

    async def _same_keeper(self, made: Notebook, verb: str, victim: str, outcome: object) -> None:
        """The kernel goes on as before the verb, or after it, or is dead because it was killed itself."""
        failed = isinstance(outcome, WarmcellError)
        info = await made.info()
        dead = not (await made.keeper.get(f"/kernels/{made.kernel_id}"))["alive"] or info["state"] == "failed"
        if dead or (victim == "guest" and info["state"] != "suspended"):

            async def ended() -> bool:
                kernel = await made.keeper.get(f"/kernels/{made.kernel_id}")
                return not kernel["alive"] or kernel["busy"] is False

            await until(ended)
        else:
            expected = "2 2 kept" if failed or verb != "restore" else "1 1 kept"
            assert await made.run(CELL) == expected
            if verb == "fork" and not failed and isinstance(outcome, dict):
                states = [one["state"] for one in outcome["sandboxes"]]
                assert states == ["running", "running"]
        assert stopped(self.places) == []
        if victim == "guest":
            return
        assert not dead, repr(outcome)
        assert await made.run("print(sum(data) >= 1)") == "True"
        if victim == "criu":
            assert await made.run("print(all(each.is_alive() for each in threads))") == "True"

    async def _next_keeper(self, made: Notebook) -> str:
        """What was suspended is there, the rest is said to be lost, and neither is in two places."""

        async def nothing_runs() -> bool:
            return await asyncio.to_thread(processes_of, self.places) == []

        await until(nothing_runs, timeout=120)  # What was being made ends by itself if nobody speaks with it.
        async with await KeeperClient.connect() as client:
            told = await client.get("/kernels")
            kept = [each["kernel_id"] for each in told["kernels"]]
            lost = [each["kernel_id"] for each in told["lost"]]
            assert sorted([*kept, *lost]) == [made.kernel_id]
            assert (await client.get("/snapshots"))["unreadable"] == []
            if kept:
                async with page(made.body["connection"]) as opened:
                    assert await opened.run(CELL) == "2 2 kept"
                return "kept"
            info = await client.post("/kernels", made.body, timeout=120)
            await client.post(f"/sandboxes/{info['id']}/restore", {"snapshot": "old"}, timeout=120)
            async with page(made.body["connection"]) as opened:
                assert await opened.run(CELL) == "1 1 kept"
            return "lost"

    async def _nothing_left(self, client: KeeperClient) -> None:
        """No process, no directory of a sandbox or of a kernel's sockets, no snapshot, no image."""
        images = self.paths.images / str(os.getuid())
        shelves = (self.paths.sandboxes, self.paths.kernels, self.paths.snapshots, images)

        def left() -> list[str]:
            entries = [str(one) for each in shelves if each.exists() for one in each.iterdir()]
            return [one for one in entries if SHELVED.search(one)] + [
                f"process {pid}" for pid in processes_of(self.places)
            ]

        async def clean() -> bool:
            return not await asyncio.to_thread(left)

        try:
            await until(clean)
        except AssertionError:
            raise AssertionError(f"left: {left()}") from None
        assert (await client.get("/snapshots"))["unreadable"] == []


@pytest.fixture
async def trials(places: Places, tmp_path: Path) -> AsyncIterator[Trials]:
    configure(places, keeper_idle_s=KEEPER_IDLE_S)
    made = Trials(places, tmp_path)
    yield made
    configure(places)
    with contextlib.suppress(TransportError):
        async with await KeeperClient.connect(start=False) as client:
            os.kill(int((await client.get("/status"))["pid"]), signal.SIGTERM)


@pytest.mark.timeout(1200)
async def test_killed_at_random(trials: Trials) -> None:
    """Ten of the trials."""
    for seed in random.Random(3).sample(range(25), 10):
        await asyncio.wait_for(trials.run(seed), 300)


async def test_a_kernel_with_threads_survives_its_saver(trials: Trials) -> None:
    """CRIU killed again and again, also while it has its code in a thread: nothing fails but the snapshot."""
    moments = random.Random(4)
    async with await KeeperClient.connect() as client, notebook(client, trials.workspace) as made:
        await made.run(THREADS)
        for number in range(15):
            await trials.disturbed(made, "snapshot", "criu", moments)
            assert await made.run(f"print({number}, all(each.is_alive() for each in threads))") == f"{number} True"
            assert stopped(trials.places) == []
        assert (await made.do("snapshot"))["id"]
    async with await KeeperClient.connect() as client:
        await end_all(client)


async def test_a_suspension_whose_worker_is_killed_at_its_end(trials: Trials) -> None:
    """The helper's work is killed in the moment in which it has ended the kernel: that is saved, and goes on."""
    async with await KeeperClient.connect() as client, notebook(client, trials.workspace) as made:
        guest_pid = int(
            await made.run(
                "import os; x, data = 0, bytearray(9); open('/tmp/file', 'w').write('kept'); print(os.getpid())"
            )
        )
        keeper = int((await client.get("/status"))["pid"])
        for number in range(1, 6):
            pid = next(one for one in processes_of(trials.places) if inner_pid(one) == guest_pid)
            ended = asyncio.Event()
            handle = os.pidfd_open(pid)
            asyncio.get_running_loop().add_reader(handle, ended.set)
            try:
                doing = asyncio.create_task(made.do("suspend"))
                workers: list[int] = []
                while not ended.is_set():
                    workers = [below for below, name in descendants(keeper).items() if name == "warmcell-work"]
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(ended.wait(), LOOK_S)
                for worker in workers:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)
            finally:
                asyncio.get_running_loop().remove_reader(handle)
                os.close(handle)
            assert (await asyncio.wait_for(doing, 120))["state"] == "suspended"
            assert await made.run(CELL) == f"{number} {number} kept"
        await end_all(client)


async def test_a_trap_of_its_own_ends_a_kernel(places: Places, tmp_path: Path) -> None:
    """That saving is safe from traps does not make a kernel immune to them."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        made.page.send("import os, signal; os.kill(os.getpid(), signal.SIGTRAP)")

        async def ended() -> bool:
            return not (await client.get(f"/kernels/{made.kernel_id}"))["alive"]

        await until(ended)


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_killed_at_random_for_long(trials: Trials) -> None:
    """Two hundred of the trials: every verb with every victim, at eight moments each."""
    for seed in range(200):
        try:
            print(f"trial {seed}:", await asyncio.wait_for(trials.run(seed), 300))  # noqa: T201 - for the log that is kept
        except Exception as error:
            raise AssertionError(f"trial {seed}") from error
