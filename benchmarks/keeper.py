"""The keeper behind a Jupyter server: what is asked of it directly, and what its sandboxes take."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jupyter_client.asynchronous.client import AsyncKernelClient

from benchmarks import pages
from benchmarks.server import ANSWER_TIMEOUT_S, LOOK_AGAIN_S, BenchmarkError
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.paths import Paths

SETTLE_TIMEOUT_S = 120.0
WORKERS = ("warmcell-work",)
"""Processes of the helper that finish an image which can be used already."""


class Keeper:
    """A connection of its own to the keeper of these directories, which is up."""

    def __init__(self, places: Places) -> None:
        self.paths = Paths(runtime=places.runtime, state=places.state, leases=places.leases)

    async def __aenter__(self) -> Self:
        self._client = await KeeperClient.connect(paths=self.paths, start=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    def pid(self) -> int:
        """Of the keeper's process."""
        return int(json.loads(self.paths.keeper_lock.read_text())["pid"])

    async def sandbox(self, kernel_id: str) -> dict[str, Any]:
        """What is told of a kernel's sandbox."""
        found: list[dict[str, Any]] = (await self._client.get("/sandboxes"))["sandboxes"]
        return next(info for info in found if info["kernel_id"] == kernel_id)

    async def do(self, verb: str, sandbox_id: str, **body: object) -> dict[str, Any]:
        """`POST /sandboxes/{id}/{verb}`: suspend, resume, snapshot, restore or fork.

        Raises:
            WarmcellError: What the keeper answers; `UnsupportedOperationError` where there is no engine.
        """
        answer: dict[str, Any] = await self._client.post(f"/sandboxes/{sandbox_id}/{verb}", body, timeout=600.0)
        return answer

    async def create(self, spec: Mapping[str, Any]) -> str:
        """A sandbox of a spec; its id."""
        made: dict[str, Any] = await self._client.post("/sandboxes", {"spec": dict(spec)}, timeout=ANSWER_TIMEOUT_S)
        return str(made["id"])

    async def stop(self, sandbox_id: str) -> None:
        """Remove a sandbox that has no kernel of Jupyter's."""
        await self._client.delete(f"/sandboxes/{sandbox_id}")

    async def warm(self) -> None:
        """Wait until a sandbox is prepared and no template is being imported.

        Raises:
            BenchmarkError: It takes too long.
        """
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            told: list[dict[str, Any]] = (await self._client.get("/templates"))["templates"]
            settled = all(one["status"]["state"] in ("ready", "none") for one in told)
            if settled and any(one["prepared"] for one in told):
                return
            if time.monotonic() > deadline:
                raise BenchmarkError(f"no sandbox was prepared within {SETTLE_TIMEOUT_S:.0f} s: {told}")
            await asyncio.sleep(LOOK_AGAIN_S)

    async def snapshots(self) -> list[dict[str, Any]]:
        """What is told of all snapshots."""
        found: list[dict[str, Any]] = (await self._client.get("/snapshots"))["snapshots"]
        return found

    async def sizes(self, snapshot: str) -> dict[str, float]:
        """What a snapshot takes: its image and its files on disk by themselves, and the memory that it is of."""
        info = await self._client.get(f"/snapshots/{snapshot}")
        return {name: info[f"{name}_bytes"] for name in ("image", "layer", "memory")}

    async def remove(self, kernel_ids: Sequence[str]) -> None:
        """Kernels with all that is theirs, side by side."""
        await asyncio.gather(*(self._client.delete(f"/kernels/{kernel_id}") for kernel_id in kernel_ids))

    @contextlib.asynccontextmanager
    async def client(self, kernel_id: str) -> AsyncIterator["Direct"]:
        """A client on the host side of the kernel's proxy, as a notebook server is one."""
        told = await self._client.get(f"/kernels/{kernel_id}")
        client = AsyncKernelClient()
        client.load_connection_info(told["connection"])
        client.start_channels(shell=True, iopub=True, stdin=False, hb=False, control=False)
        try:
            yield Direct(client)
        finally:
            client.stop_channels()

    async def settled(self) -> None:
        """Wait until nothing is done any more to what has been saved.

        Raises:
            BenchmarkError: It takes too long.
        """
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while self._working():
            if time.monotonic() > deadline:
                raise BenchmarkError(f"a snapshot was still worked on after {SETTLE_TIMEOUT_S:.0f} s")
            await asyncio.sleep(LOOK_AGAIN_S)

    def _working(self) -> bool:
        """Whether the helper works: root's own, which is a child of the keeper, else anybody's.

        A worker that has a child holds a sandbox.
        """
        table = list(processes())
        keeper = self.pid()
        children = {one.session for one in table if one.parent == keeper}
        parents = {one.parent for one in table}
        own = os.getuid() == 0
        return any(
            one.name in WORKERS and one.pid not in parents and (one.session in children or not own) for one in table
        )

    def forget(self, snapshot: str) -> bool:
        """Drop a snapshot's memory from the page cache; False where that of others may not be touched.

        Raises:
            BenchmarkError: It is still there.
        """
        image = self.image(snapshot)
        if image is not None:
            pages.forget(image)
        return image is not None

    def image(self, snapshot: str) -> Path | None:
        """Where root's own helper has a snapshot's memory; that of others nobody may read."""
        return self.paths.images / str(os.getuid()) / snapshot if os.getuid() == 0 else None


@dataclass(frozen=True, slots=True)
class Direct:
    """The shell channel of one kernel."""

    client: AsyncKernelClient

    async def execute(self, code: str) -> Mapping[str, Any]:
        """Run code; its `execute_reply`'s content.

        Raises:
            BenchmarkError: The reply is an error, or none came.
        """
        asked = self.client.execute(code, store_history=False, allow_stdin=False)
        while True:
            try:
                reply = await self.client.get_shell_msg(timeout=ANSWER_TIMEOUT_S)
            except Exception as error:  # queue.Empty; it has no sentence of its own
                raise BenchmarkError(f"{code!r} was not answered within {ANSWER_TIMEOUT_S:.0f} s") from error
            if reply["parent_header"].get("msg_id") == asked:
                break
        content: Mapping[str, Any] = reply["content"]
        if content["status"] != "ok":
            raise BenchmarkError(f"{code!r} gave {content.get('ename')}: {content.get('evalue')}")
        return content


@dataclass(frozen=True, slots=True)
class Process:
    """One row of the machine's process table."""

    pid: int
    name: str
    parent: int
    session: int


def processes() -> Iterator[Process]:
    """All of the machine."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                before, _, after = Path(f"/proc/{entry}/stat").read_text().rpartition(")")
                fields = after.split()
                yield Process(int(entry), before.partition("(")[2], int(fields[1]), int(fields[3]))
