"""`warmcell.AsyncSandbox`: throwaway sandboxes for code that nobody has read, for an event loop."""

import builtins
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NoReturn, Self, Unpack

from warmcell.sandbox.client import core
from warmcell.sandbox.client.async_commands import AsyncCommand
from warmcell.sandbox.client.async_files import AsyncFiles
from warmcell.sandbox.client.calls import Calls
from warmcell.sandbox.client.core import Core, OnResult, Telling
from warmcell.sandbox.client.results import Execution, Metrics
from warmcell.sandbox.client.transport import AsyncTransport, Where
from warmcell.sandbox.client.wanted import Network, OnTimeout, Wanted, asked_of, policy_of
from warmcell.sandbox.errors import ConflictError, WarmcellError
from warmcell.sandbox.models import ExecResult, SandboxInfo, SnapshotInfo


class AsyncSandbox:
    """`Sandbox` for an event loop; callbacks may be coroutine functions.

        async with AsyncSandbox() as box:
            await box.run("x = 1")
            (await box.run("x + 1")).text

    It is made by `async with`, or by `await AsyncSandbox.create()`.
    """

    _core: Core
    files: AsyncFiles

    def __init__(self, **wanted: Unpack[Wanted]) -> None:
        """Nothing is there yet. The arguments are those of `Sandbox`.

        Raises:
            InvalidRequestError: One of them makes no sense.
        """
        self._where = Where.find(wanted.pop("url", None), wanted.pop("token", None))
        self._asked = asked_of(wanted)

    def __getattr__(self, name: str) -> NoReturn:
        """What is asked for is not there; raises ConflictError where that is because the sandbox is not."""
        if name in ("_core", "files"):
            raise ConflictError(
                "There is no sandbox yet", hint="Make it: `async with AsyncSandbox() as box`, or await its create()."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    @classmethod
    async def create(cls, **wanted: Unpack[Wanted]) -> Self:
        """A sandbox that answers. The arguments, and what is raised, are those of `Sandbox`."""
        return await cls(**wanted).__aenter__()

    def _take(self, its: Core, where: Where) -> None:
        self._core = its
        self._where = where
        self.files = AsyncFiles(its.files)

    @classmethod
    def _of(cls, info: SandboxInfo, where: Where) -> Self:
        box = cls.__new__(cls)
        box._take(Core(AsyncTransport(where), info), where)
        return box

    @classmethod
    async def connect(
        cls, sandbox_id: str, *, timeout: float | None = None, url: str | None = None, token: str | None = None
    ) -> Self:
        """As `Sandbox.connect`."""
        where = Where.find(url, token)
        transport = AsyncTransport(where)
        try:
            info = await core.connect(Calls(transport), sandbox_id, timeout)
        finally:
            await transport.close()
        return cls._of(info, where)

    @classmethod
    async def list(
        cls,
        *,
        tags: Mapping[str, str] | None = None,
        states: Sequence[str] | None = None,
        owner: str = "client",
        url: str | None = None,
        token: str | None = None,
    ) -> "builtins.list[SandboxInfo]":
        """As `Sandbox.list`."""
        transport = AsyncTransport(Where.find(url, token))
        try:
            return await core.listing(Calls(transport), tags=tags, states=states, owner=owner)
        finally:
            await transport.close()

    @property
    def id(self) -> str:
        """As `Sandbox.id`."""
        return self._core.id

    @property
    def tags(self) -> dict[str, str]:
        """As `Sandbox.tags`."""
        terms = self._core.info.terms
        return {} if terms is None else dict(terms.tags)

    async def info(self) -> SandboxInfo:
        """As `Sandbox.info`."""
        return await self._core.refresh()

    async def metrics(self) -> Metrics:
        """As `Sandbox.metrics`."""
        return await self._core.metrics()

    async def set_timeout(self, timeout: float | None, *, on_timeout: OnTimeout | None = None) -> SandboxInfo:
        """As `Sandbox.set_timeout`."""
        changes = {} if on_timeout is None else {"on_timeout": on_timeout}
        return await self._core.set_terms(timeout_s=timeout, **changes)

    async def set_tags(self, tags: Mapping[str, str]) -> SandboxInfo:
        """As `Sandbox.set_tags`."""
        return await self._core.set_terms(tags=dict(tags))

    async def merge_tags(self, tags: Mapping[str, str | None]) -> SandboxInfo:
        """As `Sandbox.merge_tags`."""
        return await self._core.set_terms(merge_tags=dict(tags))

    async def set_network(self, network: Network) -> SandboxInfo:
        """As `Sandbox.set_network`."""
        return await self._core.set_terms(network=policy_of(network))

    async def run(
        self,
        code: str,
        *,
        context: str = "default",
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        on_stdout: Telling | None = None,
        on_stderr: Telling | None = None,
        on_result: OnResult | None = None,
    ) -> Execution:
        """As `Sandbox.run`."""
        work = self._core.run(
            code,
            context=context,
            timeout_s=timeout,
            env=env,
            on_stdout=on_stdout,
            on_stderr=on_stderr,
            on_result=on_result,
        )
        return await work

    async def interrupt(self) -> None:
        """As `Sandbox.interrupt`."""
        await self._core.interrupt()

    async def create_context(self, *, cwd: str = "") -> str:
        """As `Sandbox.create_context`."""
        return await self._core.create_context(cwd)

    async def contexts(self) -> "builtins.list[str]":
        """As `Sandbox.contexts`."""
        return await self._core.contexts()

    async def remove_context(self, context: str) -> None:
        """As `Sandbox.remove_context`."""
        await self._core.remove_context(context)

    async def restart_context(self, context: str) -> None:
        """As `Sandbox.restart_context`."""
        await self._core.restart_context(context)

    async def exec(
        self,
        *argv: str,
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        input: bytes | str = b"",
        timeout: float | None = None,
        on_stdout: Telling | None = None,
        on_stderr: Telling | None = None,
    ) -> ExecResult:
        """As `Sandbox.exec`."""
        work = self._core.exec(
            argv, cwd=cwd, env=env, input=input, timeout_s=timeout, on_stdout=on_stdout, on_stderr=on_stderr
        )
        return await work

    async def spawn(
        self,
        *argv: str,
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        pty: tuple[int, int] | None = None,
        tag: str = "",
    ) -> AsyncCommand:
        """As `Sandbox.spawn`."""
        info = await self._core.spawn(argv, cwd=cwd, env=env, timeout_s=timeout, pty=pty, tag=tag)
        return AsyncCommand(self._core, info)

    async def command(self, command_id: str) -> AsyncCommand:
        """As `Sandbox.command`."""
        return AsyncCommand(self._core, await self._core.command(command_id))

    async def commands(self) -> "builtins.list[AsyncCommand]":
        """As `Sandbox.commands`."""
        return [AsyncCommand(self._core, info) for info in await self._core.commands()]

    async def forward(self, port: int, *, expires: float = 3600.0) -> str:
        """As `Sandbox.forward`."""
        return await self._core.forward(port, expires)

    async def fork(self, n: int = 1) -> "builtins.list[Self]":
        """As `Sandbox.fork`."""
        return [self._of(info, self._where) for info in await self._core.fork(n)]

    async def snapshot(self, name: str = "") -> SnapshotInfo:
        """As `Sandbox.snapshot`."""
        return await self._core.snapshot(name)

    async def restore(self, snapshot: str | SnapshotInfo) -> SandboxInfo:
        """As `Sandbox.restore`."""
        return await self._core.restore(snapshot if isinstance(snapshot, str) else snapshot.id)

    async def suspend(self) -> SandboxInfo:
        """As `Sandbox.suspend`."""
        return await self._core.suspend()

    async def resume(self) -> SandboxInfo:
        """As `Sandbox.resume`."""
        return await self._core.resume()

    async def kill(self) -> None:
        """As `Sandbox.kill`."""
        await self._core.kill()

    async def close(self) -> None:
        """As `Sandbox.close`."""
        await self._core.transport.close()

    async def __aenter__(self) -> Self:
        if "_core" in vars(self):  # It is there: created, connected to, or a copy.
            return self
        transport = AsyncTransport(self._where)
        try:
            info = await core.create(Calls(transport), self._asked, local=self._where.url is None)
        except BaseException:
            await transport.close()
            raise
        self._take(Core(transport, info), self._where)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.kill()
        except WarmcellError:
            if error is None:
                raise
        finally:
            await self.close()

    def __repr__(self) -> str:
        return f"<AsyncSandbox {self.id}>"
