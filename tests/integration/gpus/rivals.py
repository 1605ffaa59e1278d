"""Keepers of two users compete for the GPUs of a machine, and one is killed at any moment: trial after trial.

A program of its own, so that a trial costs a fork and no interpreter. Each keeper writes into memory that all share
what it believes to have, looks whether another one believes the same, and tells. Started with a directory, a number of
trials and a seed, it prints one JSON object.
"""

import asyncio
import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from tests.lanes import ordinary_uid
from warmcell.sandbox.errors import NoGpuAvailableError
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.models import GpuDevice, SandboxId

KINDS = [{"name": "A100", "memory": "80GiB", "count": 2}, {"name": "T4", "memory": "16GiB"}]
WISHES = ("any", "A100", "A100:2", "any:3", "any/2", "A100/2", "T4")
DEVICES = 3
WHOLE, HALF = 1, 2
STARVED_S = 60.0
"""Whoever has waited for so long among rivals that hold for milliseconds has been forgotten."""

TRIAL_S = 0.15


class Board:
    """Memory that the keepers of a trial share: what each believes to have, and what was seen to be wrong."""

    SLOTS = 3
    STOP, KILLED, GRANTS, WRONG, ROWS = 0, 1, 4, 16, 32

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4096)

    def grants(self, slot: int) -> int:
        """How often this keeper was served, up to 65535."""
        return int.from_bytes(self.memory[self.GRANTS + 2 * slot : self.GRANTS + 2 * slot + 2], "little")

    def count(self, slot: int) -> None:
        """It was served once more."""
        now = min(self.grants(slot) + 1, 65535)
        self.memory[self.GRANTS + 2 * slot : self.GRANTS + 2 * slot + 2] = now.to_bytes(2, "little")

    def has(self, slot: int, devices: tuple[GpuDevice, ...]) -> None:
        """This keeper has these; wrong if another one that lives has too much of them."""
        for device in devices:
            self.memory[self.ROWS + slot * DEVICES + device.index] = WHOLE if device.parts == 1 else HALF
        for device in devices:
            found = [
                self.memory[self.ROWS + other * DEVICES + device.index]
                for other in range(self.SLOTS)
                if not self.memory[self.KILLED + other]
            ]
            if found.count(WHOLE) > 1 or found.count(HALF) > 2 or (WHOLE in found and HALF in found):
                self.memory[self.WRONG] = 1

    def has_not(self, slot: int) -> None:
        """This keeper has nothing any more."""
        for n in range(DEVICES):
            self.memory[self.ROWS + slot * DEVICES + n] = 0


def pool(directory: Path) -> GpuPool:
    return GpuPool(SimulatedInventory(KINDS), LeaseDirectory(directory, timeout=30), most_parts=2)


async def compete(board: Board, slot: int, directory: Path, chance: random.Random) -> None:
    """Be a keeper: ask, hold for a moment, give back, until the trial is over."""
    mine = pool(directory)
    box = SandboxId(f"s{slot}")
    while not board.memory[board.STOP]:
        devices = await mine.lease(chance.choice(WISHES), holder=box, wait_s=STARVED_S)
        board.has(slot, devices)
        board.count(slot)
        await asyncio.sleep(chance.random() * 0.003)
        board.has_not(slot)
        mine.release(box)
    mine.close()


def keeper(board: Board, slot: int, directory: Path, seed: float) -> int:
    """A process that competes; the second slot's is another user's, if there is one to become."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if slot == 1 and os.getuid() == 0:
            os.setgroups([])
            os.setgid(ordinary_uid())
            os.setuid(ordinary_uid())
        asyncio.run(compete(board, slot, directory, random.Random(seed)))
        code = 0
    except NoGpuAvailableError:
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def trial(directory: Path, chance: random.Random) -> dict[str, object]:
    """Two keepers, one of which is killed and followed by a third."""
    board = Board()
    living = {slot: keeper(board, slot, directory, chance.random()) for slot in (0, 1)}
    time.sleep(chance.random() * TRIAL_S)
    victim = chance.choice((0, 1))
    board.memory[board.KILLED + victim] = 1
    os.kill(living[victim], signal.SIGKILL)
    before = board.grants(1 - victim)
    living[2] = keeper(board, 2, directory, chance.random())
    os.waitpid(living.pop(victim), 0)
    deadline = time.monotonic() + STARVED_S
    while time.monotonic() < deadline and not (board.grants(2) and board.grants(1 - victim) > before):
        time.sleep(0.005)
    board.memory[board.STOP] = 1
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in living.values()]
    return {
        "twice": bool(board.memory[board.WRONG]),
        "starved": 2 in codes or not board.grants(2) or board.grants(1 - victim) <= before,
        "failed": codes if any(code not in (0, 2) for code in codes) else [],
        "lost": asyncio.run(lost(directory)),
        "grants": sum(map(board.grants, range(board.SLOTS))),
    }


async def lost(directory: Path) -> list[str]:
    """What is not free, or in the queue, although nobody lives."""
    after = pool(directory)
    held = [row["name"] for row in await after.status() if row["lease"] is not None]
    waiting = [row["sandbox_id"] for row in await after.queue()]
    got = await after.lease("any:3", holder=SandboxId("after"))
    after.close()
    return [*held, *waiting, *(["devices"] if len(got) != DEVICES else [])]


def main(directory: str, trials: str, seed: str) -> None:
    """Run them all."""
    chance = random.Random(int(seed))
    found = [trial(Path(directory), chance) for _ in range(int(trials))]
    wrong = [one for one in found if one["twice"] or one["starved"] or one["failed"] or one["lost"]]
    grants = sum(int(str(one["grants"])) for one in found)
    json.dump({"trials": len(found), "grants": grants, "wrong": wrong}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
