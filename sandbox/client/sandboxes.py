"""`warmcell.Sandbox`: throwaway sandboxes for code that nobody has read, from code without an event loop."""

import builtins
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from warmcell.sandbox.client import core
from warmcell.sandbox.client.calls import Calls
from warmcell.sandbox.client.commands import Command
from warmcell.sandbox.client.core import Core, OnResult, Telling
from warmcell.sandbox.client.files import Files
from warmcell.sandbox.client.results import Execution, Metrics
from warmcell.sandbox.client.transport import SyncTransport, Where, now
from warmcell.sandbox.client.wanted import TIMEOUT_S, Network, OnTimeout, Wanted, asked_of, policy_of
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.models import ExecResult, SandboxInfo, SnapshotInfo


class Sandbox:
    """A sandbox with a Python kernel: it sees nothing of the host and has no network.

        with Sandbox() as box:
            box.run("x = 1")
            box.run("x + 1").text
            box.exec("ls", "-l").stdout

    It belongs to the user's keeper, or to the server that `url` or `WARMCELL_URL` names. It lives on when this object
    goes, until its time is over; `with` kills it at its end. After a lost connection requests are sent again, and what
    was asked for is done once. Not for several threads at a time.
    """

    def __init__(
        self,
        *,
        image: str | None = None,
        python: str | None = None,
        gpu: str | Sequence[str] | None = None,
        memory: int | str | None = None,
        cpus: float | None = None,
        disk: int | str | None = None,
        env: Mapping[str, str] | None = None,
        network: Network | None = None,
        preload: Sequence[str] | None = None,
        template: str | None = None,
        backend: str | None = None,
        timeout: float | None = TIMEOUT_S,
        on_timeout: OnTimeout = "suspend",
        auto_resume: bool = True,
        tags: Mapping[str, str] | None = None,
        snapshot: str | None = None,
        key: str | None = None,
        url: str | None = None,
        token: str | None = None,
    ) -> None:
        """Start one; returns when it answers.

        Args:
            image: Name or digest of an image, as `warmcell.build_image` or an engine of containers knows it. None: the
                environment of this very Python, or the server's.
            python: Path of another Python whose environment it has.
            gpu: Which GPU, as in "A100", "H100:2", "24GiB"; several are fallbacks in order. None: none.
            memory: Most memory, in bytes or as in "2GiB".
            cpus: Most processors.
            disk: Most that it writes to each of its file systems, in bytes or as in "10GiB".
            env: Variables of its code and commands.
            network: Hosts that it reaches, as in ["pypi.org", "*.example.com"], or a policy, as in {"allow": […],
                "headers": {"api.example.com": {"Authorization": "…"}}, "packages": True}. None: nothing.
            preload: Modules that are imported in advance, where starts come from a template. Empty: none.
            template: Name of that template.
            backend: What isolates it; None: the best that this machine has.
            timeout: Seconds after which its time is over, however busy it is. None: never.
            on_timeout: What happens then: "suspend" saves memory and files to disk, where that can be done (else it is
                frozen in memory), "kill" removes it.
            auto_resume: Whether use wakes it.
            tags: To find it by.
            snapshot: Id or name of a snapshot that it goes on from, instead of the above up to `backend`, `env` apart.
            key: Whoever asks again with the same key gets the same sandbox.
            url: Of a server. None: `WARMCELL_URL`, or the user's own keeper.
            token: For that server. None: `WARMCELL_TOKEN`.

        Raises:
            WarmcellError: There is none; nothing is left of it.
        """
        wanted = Wanted(
            image=image,
            python=python,
            gpu=gpu,
            memory=memory,
            cpus=cpus,
            disk=disk,
            env=env,
            network=network,
            preload=preload,
            template=template,
            backend=backend,
            timeout=timeout,
            on_timeout=on_timeout,
            auto_resume=auto_resume,
            tags=tags,
            snapshot=snapshot,
            key=key,
        )
        where, asked = Where.find(url, token), asked_of(wanted)
        transport = SyncTransport(where)
        try:
            info = now(core.create(Calls(transport), asked, local=where.url is None))
        except BaseException:
            now(transport.close())
            raise
        self._take(Core(transport, info), where)

    def _take(self, its: Core, where: Where) -> None:
        self._core = its
        self._where = where
        self.files = Files(its.files)

    @classmethod
    def _of(cls, info: SandboxInfo, where: Where) -> Self:
        box = cls.__new__(cls)
        box._take(Core(SyncTransport(where), info), where)
        return box

    @classmethod
    def connect(
        cls, sandbox_id: str, *, timeout: float | None = None, url: str | None = None, token: str | None = None
    ) -> Self:
        """One that is there, awake; its time begins anew.

        Args:
            sandbox_id: Its id.
            timeout: Seconds from now on. None: as many as before.
            url: As of `Sandbox`.
            token: As of `Sandbox`.

        Raises:
            SandboxNotFoundError: There is none, or no more.
        """
        where = Where.find(url, token)
        transport = SyncTransport(where)
        try:
            info = now(core.connect(Calls(transport), sandbox_id, timeout))
        finally:
            now(transport.close())
        return cls._of(info, where)

    @classmethod
    def list(
        cls,
        *,
        tags: Mapping[str, str] | None = None,
        states: Sequence[str] | None = None,
        owner: str = "client",
        url: str | None = None,
        token: str | None = None,
    ) -> "builtins.list[SandboxInfo]":
        """Those there are, the oldest first.

        Args:
            tags: All of these must be theirs.
            states: As in "running", "suspended". None: any.
            owner: "client": those that code has asked for; empty: notebooks' too.
            url: As of `Sandbox`.
            token: As of `Sandbox`.
        """
        transport = SyncTransport(Where.find(url, token))
        try:
            return now(core.listing(Calls(transport), tags=tags, states=states, owner=owner))
        finally:
            now(transport.close())

    @property
    def id(self) -> str:
        """By which `connect` finds it."""
        return self._core.id

    @property
    def tags(self) -> dict[str, str]:
        """As they were when it was last asked for."""
        terms = self._core.info.terms
        return {} if terms is None else dict(terms.tags)

    def info(self) -> SandboxInfo:
        """What is told of it now.

        Raises:
            SandboxNotFoundError: It is no more.
        """
        return now(self._core.refresh())

    def metrics(self) -> Metrics:
        """What it uses now."""
        return now(self._core.metrics())

    def set_timeout(self, timeout: float | None, *, on_timeout: OnTimeout | None = None) -> SandboxInfo:
        """Its time ends so many seconds from now; None: never."""
        changes = {} if on_timeout is None else {"on_timeout": on_timeout}
        return now(self._core.set_terms(timeout_s=timeout, **changes))

    def set_tags(self, tags: Mapping[str, str]) -> SandboxInfo:
        """Its tags are these from now on."""
        return now(self._core.set_terms(tags=dict(tags)))

    def merge_tags(self, tags: Mapping[str, str | None]) -> SandboxInfo:
        """These are set, those that are None go, and all others stay, whoever else changes them meanwhile."""
        return now(self._core.set_terms(merge_tags=dict(tags)))

    def set_network(self, network: Network) -> SandboxInfo:
        """What it reaches from now on, as `network` of `Sandbox`; connections of until now end."""
        return now(self._core.set_terms(network=policy_of(network)))

    def run(
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
        """Run Python in its kernel, where variables stay from one run to the next.

        Args:
            code: As in a notebook's cell.
            context: Where it runs; `create_context` makes further ones, each a process of its own. Code of one runs in
                turn, code of several at once.
            timeout: Seconds after which it is interrupted; `Execution.error` says so. None: never.
            env: Variables of the environment that are set first, and stay.
            on_stdout: Told what it prints, as it comes.
            on_stderr: Told what it prints there.
            on_result: Told what it shows.

        Raises:
            SandboxDiedError: The kernel, or the context's process, has ended. The next run begins with another one.
        """
        work = self._core.run(
            code,
            context=context,
            timeout_s=timeout,
            env=env,
            on_stdout=on_stdout,
            on_stderr=on_stderr,
            on_result=on_result,
        )
        return now(work)

    def interrupt(self) -> None:
        """Interrupt the code that runs in its kernel."""
        now(self._core.interrupt())

    def create_context(self, *, cwd: str = "") -> str:
        """Another Python with variables of its own, which runs beside the others; its id is for `run`.

        Suspending, snapshots and forks keep it like all else. When the default context's process ends, all end.

        Args:
            cwd: Where it begins; empty: where the kernel is.

        Raises:
            InvalidRequestError: There is no such directory.
        """
        return now(self._core.create_context(cwd))

    def contexts(self) -> "builtins.list[str]":
        """Ids of its contexts."""
        return now(self._core.contexts())

    def remove_context(self, context: str) -> None:
        """End one, with its variables and what runs in it."""
        now(self._core.remove_context(context))

    def restart_context(self, context: str) -> None:
        """Have one begin anew, without its variables; what runs in it ends as interrupted."""
        now(self._core.restart_context(context))

    def exec(
        self,
        *argv: str,
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        input: bytes | str = b"",
        timeout: float | None = None,
        on_stdout: Telling | None = None,
        on_stderr: Telling | None = None,
    ) -> ExecResult:
        """Run a command to its end. One that fails is no error: see `exit_code`.

        Args:
            *argv: The command, each argument by itself; `"sh", "-c", "…"` for a shell.
            cwd: Its directory; empty: its home.
            env: Variables besides the sandbox's.
            input: Its standard input, 8 MiB at most.
            timeout: Seconds after which it is killed. None: never.
            on_stdout: Told what it writes, as it comes.
            on_stderr: Told what it writes there.

        Raises:
            OperationTimeoutError: It was killed for its time; `details` has the `stdout` and `stderr` until then.
        """
        work = self._core.exec(
            argv, cwd=cwd, env=env, input=input, timeout_s=timeout, on_stdout=on_stdout, on_stderr=on_stderr
        )
        return now(work)

    def spawn(
        self,
        *argv: str,
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        pty: tuple[int, int] | None = None,
        tag: str = "",
    ) -> Command:
        """Start a command that goes on by itself, also when this program ends.

        Args:
            *argv: As of `exec`.
            cwd: As of `exec`.
            env: As of `exec`.
            timeout: As of `exec`.
            pty: Rows and columns of a terminal that it gets.
            tag: A word to know it by.
        """
        info = now(self._core.spawn(argv, cwd=cwd, env=env, timeout_s=timeout, pty=pty, tag=tag))
        return Command(self._core, info)

    def command(self, command_id: str) -> Command:
        """One that was started before, here or by another program.

        Raises:
            NotFoundError: It ended long ago, or never was.
        """
        return Command(self._core, now(self._core.command(command_id)))

    def commands(self) -> "builtins.list[Command]":
        """Those that run, and those that have ended last."""
        return [Command(self._core, info) for info in now(self._core.commands())]

    def forward(self, port: int, *, expires: float = 3600.0) -> str:
        """A URL of what listens on a port of the sandbox's own loopback interface, for browsers and programs.

        It needs no token, so whoever has it has the port, until its time is over, the sandbox ends, or the token that
        it was made with is revoked. HTTP and WebSockets; cookies and credentials of the server are kept from both ends.

        Args:
            port: The number of the port; something may begin to listen there later.
            expires: Seconds that the URL is good for; a week at most.

        Raises:
            UnsupportedOperationError: The sandbox is had from the user's keeper, which browsers do not reach.
        """
        return now(self._core.forward(port, expires))

    def fork(self, n: int = 1) -> "builtins.list[Self]":
        """Copies of it, with its memory and its files as they are now; it goes on. Commands that run are not copied.

        Raises:
            UnsupportedOperationError: Memory cannot be saved here; nothing was done.
        """
        return [self._of(info, self._where) for info in now(self._core.fork(n))]

    def snapshot(self, name: str = "") -> SnapshotInfo:
        """Save memory and files; it goes on. `restore` and `Sandbox(snapshot=…)` go back there. Raises as `fork`."""
        return now(self._core.snapshot(name))

    def restore(self, snapshot: str | SnapshotInfo) -> SandboxInfo:
        """Put it back to one of its snapshots; commands that run are killed.

        Raises:
            SnapshotNotFoundError: It has none of that name or id.
        """
        return now(self._core.restore(snapshot if isinstance(snapshot, str) else snapshot.id))

    def suspend(self) -> SandboxInfo:
        """Save it to disk and give back what it has of the machine; commands that run are killed. Raises as `fork`."""
        return now(self._core.suspend())

    def resume(self) -> SandboxInfo:
        """Have it go on, as any use of it does."""
        return now(self._core.resume())

    def kill(self) -> None:
        """Remove it and all that is in it. Idempotent."""
        now(self._core.kill())

    def close(self) -> None:
        """Let go of it: it lives on, until its time is over."""
        now(self._core.transport.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.kill()
        except WarmcellError:
            if error is None:
                raise
        finally:
            self.close()

    def __repr__(self) -> str:
        return f"<Sandbox {self.id}>"
