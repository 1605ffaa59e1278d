"""`python -m warmcell.sandbox.gpus.parker`: the one process that asks the NVIDIA driver to park others.

It speaks JSON lines on its standard streams: `{"id", "do", "pids", …}` is answered by `{"id", …}` or `{"id", "error"}`.
The driver's libraries are loaded here and nowhere else of ours: a driver that crashes takes nobody along, and the
seconds that it needs to come up are spent once.
"""

import functools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

AT_ONCE = 4


class Refused(Exception):
    """A step of the driver's that did not work."""

    def __init__(self, step: str, pid: int, words: str, *, lost: bool = False) -> None:
        super().__init__(words)
        self.told = {"step": step, "pid": pid, "words": words, "lost": lost}


class Driver(Protocol):
    """What is asked of the driver for one process; `cuda.core.checkpoint` is the real one."""

    def state(self, pid: int) -> str | None:
        """running, locked, checkpointed or failed; None: it does not use CUDA, as far as can be seen."""

    def lock(self, pid: int, timeout_ms: int) -> None: ...
    def checkpoint(self, pid: int) -> None: ...
    def restore(self, pid: int, mapping: Mapping[str, str] | None) -> None: ...
    def unlock(self, pid: int) -> None: ...


class CudaDriver:
    """Through `cuda.core.checkpoint`. Making one loads the driver, which may take seconds."""

    def __init__(self) -> None:
        from cuda.bindings import driver
        from cuda.core import checkpoint

        (error,) = driver.cuInit(0)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"The driver does not come up: {error.name}")
        self._process = checkpoint.Process

    def state(self, pid: int) -> str | None:
        """See `Driver`."""
        try:
            return str(self._process(pid).state)
        except RuntimeError:  # The driver cannot do it at all.
            raise
        except Exception:  # What it says of a process without CUDA, and of one that it may not look into.
            return None

    def lock(self, pid: int, timeout_ms: int) -> None:
        """See `Driver`."""
        self._process(pid).lock(timeout_ms)

    def checkpoint(self, pid: int) -> None:
        """See `Driver`."""
        self._process(pid).checkpoint()

    def restore(self, pid: int, mapping: Mapping[str, str] | None) -> None:
        """See `Driver`."""
        self._process(pid).restore(dict(mapping) if mapping else None)

    def unlock(self, pid: int) -> None:
        """See `Driver`."""
        self._process(pid).unlock()


def park(driver: Driver, pids: Sequence[int], *, lock_ms: int) -> list[int]:
    """Park all of them that use CUDA, or none; who did.

    All are locked before the first is emptied: they may share work.

    Raises:
        Refused: A step failed. Unless it says that something is lost, all run on.
    """
    found = [pid for pid in pids if driver.state(pid) in ("running", "locked")]
    touched: list[int] = []
    try:
        for pid in found:
            if driver.state(pid) == "running":
                touched.append(pid)
                _step("lock", pid, functools.partial(driver.lock, pid, lock_ms))
        for pid in found:
            _step("checkpoint", pid, functools.partial(driver.checkpoint, pid))
    except Refused as refused:
        _run_on(driver, dict.fromkeys([*touched, *found]), refused)
        raise
    return found


def unpark(driver: Driver, pids: Sequence[int], mapping: Mapping[str, str] | None) -> list[int]:
    """Have all of them that are parked go on, or none; who runs on. Those that are only locked are unlocked.

    Those that run already have come back when nobody waited for it any more.

    Raises:
        Refused: A step failed. Unless it says that something is lost, all are parked as before.
    """
    states = {pid: driver.state(pid) for pid in pids}
    parked = [pid for pid, state in states.items() if state == "checkpointed"]
    back: list[int] = []
    try:
        for pid in parked:
            _step("restore", pid, functools.partial(driver.restore, pid, mapping))
            back.append(pid)
    except Refused as refused:
        for pid in back:
            try:
                driver.checkpoint(pid)
            except Exception:
                refused.told["lost"] = True
        if any(driver.state(pid) != "checkpointed" for pid in parked):
            refused.told["lost"] = True
        raise
    locked = [pid for pid, state in states.items() if state in ("checkpointed", "locked")]
    for pid in locked:
        _step("unlock", pid, functools.partial(driver.unlock, pid))
    return [pid for pid, state in states.items() if state in ("checkpointed", "locked", "running")]


def _step(name: str, pid: int, what: Callable[[], None]) -> None:
    try:
        what()
    except Exception as error:
        raise Refused(name, pid, str(error) or type(error).__name__) from error


def _run_on(driver: Driver, pids: Mapping[int, None], refused: Refused) -> None:
    """Undo what was done before a step failed."""
    for pid in pids:
        try:
            if driver.state(pid) == "checkpointed":
                driver.restore(pid, None)
            if driver.state(pid) == "locked":
                driver.unlock(pid)
        except Exception:
            refused.told["lost"] = True
        if driver.state(pid) == "failed":
            refused.told["lost"] = True


class Parker:
    """Answers the lines of whoever started it, several at a time."""

    def __init__(self, driver: Driver, write: Callable[[bytes], object]) -> None:
        self._driver = driver
        self._write = write
        self._one_at_a_time = threading.Lock()

    def say(self, what: Mapping[str, Any]) -> None:
        """Write a line."""
        with self._one_at_a_time:
            self._write(json.dumps(what).encode() + b"\n")

    def serve(self, lines: Iterable[bytes]) -> None:
        """Answer each line, until there are no more."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for line in lines:
                pool.submit(self._answer, line)

    def _answer(self, line: bytes) -> None:
        asked = json.loads(line)
        try:
            answer: dict[str, Any] = {"pids": self._do(asked)}
        except Refused as refused:
            answer = {"error": refused.told}
        except Exception as error:
            answer = {"error": {"step": asked.get("do"), "pid": 0, "words": str(error), "lost": False}}
        self.say({"id": asked["id"], **answer})

    def _do(self, asked: Mapping[str, Any]) -> list[int]:
        pids = [int(pid) for pid in asked["pids"]]
        if asked["do"] == "park":
            return park(self._driver, pids, lock_ms=int(asked["lock_ms"]))
        if asked["do"] == "unpark":
            return unpark(self._driver, pids, asked.get("mapping"))
        raise ValueError(f"{asked['do']!r} is nothing that can be done")


def main() -> int:
    """Serve standard input; the first line out says whether there is a driver that can do it."""
    # Whatever a library prints belongs to nobody's answer.
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        parker = Parker(CudaDriver(), lambda line: os.write(out, line))
    except Exception as error:
        missing = isinstance(error, ImportError)
        os.write(out, json.dumps({"ready": False, "missing": missing, "words": str(error)}).encode() + b"\n")
        return 1
    parker.say({"ready": True})
    parker.serve(sys.stdin.buffer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
