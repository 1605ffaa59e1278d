"""Connections that break between a request and its answer, at known places."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any, Literal, cast

import httpx

from warmcell import Sandbox
from warmcell.sandbox.client.core import Core
from warmcell.sandbox.client.transport import AsyncTransport, Stream, SyncTransport, Transport, Where, now

Place = Literal["body", "head"]
"""Right after the request's last byte, before any of the answer; or right after the answer's head."""


class _Cuts:
    """Breaks so many connections: of three to the same path the first two, at one place and at the other in turn."""

    def __init__(self, where: Where, cuts: int) -> None:
        super().__init__(where)  # type: ignore[call-arg] # a transport's
        self.cuts: Counter[Place] = Counter()
        self._wanted = cuts
        self._times: Counter[str] = Counter()

    @property
    def _whole(self) -> Transport:
        """The same, nothing of which breaks."""
        whole: Any = super()
        return cast(Transport, whole)

    def _trace(self, name: str, info: object) -> Any:
        if name == "http11.send_request_body.complete":
            self.cuts["body"] += 1
            raise httpx.ReadError("cut after the body")

    def _cut(self, path: str) -> Place | None:
        if self.cuts.total() == self._wanted:
            return None
        self._times[path] += 1
        if self._times[path] % 3 == 0:
            return None
        return "body" if self.cuts.total() % 2 == 0 else "head"

    async def sleep(self, seconds: float) -> None:
        await self._whole.sleep(seconds / 100)

    async def request(self, method: str, path: str, **how: Any) -> httpx.Response:
        place = self._cut(method + path)
        if place is None:
            return await self._whole.request(method, path, **how)
        content = how.pop("content", None)
        how["content"] = b"".join(content()) if callable(content) else content
        async with self._broken(place, method, path, **how):
            raise AssertionError("it is broken before")
        raise AssertionError("it is broken before")

    @contextlib.asynccontextmanager
    async def stream(self, method: str, path: str, **how: Any) -> AsyncGenerator[Stream]:
        place = self._cut(method + path)
        whole = self._whole.stream(method, path, **how)
        async with whole if place is None else self._broken(place, method, path, **how) as stream:
            yield stream

    @contextlib.asynccontextmanager
    async def _broken(self, place: Place, method: str, path: str, **how: Any) -> AsyncGenerator[Stream]:
        extensions = {"trace": self._trace} if place == "body" else {}
        async with self._whole.stream(method, path, extensions=extensions, **how) as stream:
            self.cuts["head"] += 1
            raise httpx.ReadError("cut after the head")
            yield stream


class Cutting(_Cuts, SyncTransport):
    """Without a loop."""


class AsyncCutting(_Cuts, AsyncTransport):
    """In a loop."""

    async def _trace(self, name: str, info: object) -> None:
        super()._trace(name, info)


def count_through(transport: Cutting, box: Sandbox, rounds: int) -> None:
    """Have so many runs, commands and pieces of input count, over connections that break; look whether each did once.

    Raises:
        AssertionError: One was done twice, or not at all, or its answer was not its own.
    """
    _begin(box)
    now(_count(Core(transport, box.info()), rounds))
    now(transport.close())
    _check(box, rounds)


async def count_through_in_loop(transport: AsyncCutting, box: Sandbox, rounds: int) -> None:
    """The same in a loop; raises as `count_through`."""
    await asyncio.to_thread(_begin, box)
    await _count(Core(transport, await asyncio.to_thread(box.info)), rounds)
    await transport.close()
    await asyncio.to_thread(_check, box, rounds)


def _begin(box: Sandbox) -> None:
    box.run("open('runs', 'w').close(); open('commands', 'w').close()")


async def _count(core: Core, rounds: int) -> None:
    nothing: dict[str, Any] = {"on_stdout": None, "on_stderr": None}
    for number in range(rounds):
        code = f"print({number}, file=open('runs', 'a')); print({number})"
        ran = await core.run(code, context="default", timeout_s=60, env=None, on_result=None, **nothing)
        assert ran.stdout == f"{number}\n"
        argv = ["sh", "-c", f"echo {number} >> commands; echo {number}"]
        done = await core.exec(argv, cwd="", env=None, input=b"", timeout_s=60, **nothing)
        assert done.stdout == f"{number}\n"
    command = await core.spawn(["cat"], cwd="", env=None, timeout_s=60, pty=None, tag="")
    for number in range(rounds):
        await core.write(command.id, f"{number},")
    await core.write(command.id, b"", close=True)
    assert (await core.wait(command.id, None, None)).stdout == "".join(f"{number}," for number in range(rounds))


def _check(box: Sandbox, rounds: int) -> None:
    expected = "".join(f"{number}\n" for number in range(rounds))
    assert box.files.read_text("runs") == expected
    assert box.files.read_text("commands") == expected
