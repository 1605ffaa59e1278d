"""Code that is run in a sandbox's kernel for clients that may lose their connection and come back."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Literal

from warmcell.extension.keeper.agents import checks
from warmcell.extension.keeper.agents.kernel_client import KernelClient
from warmcell.extension.keeper.agents.output import Output, forget_oldest
from warmcell.sandbox import errors
from warmcell.sandbox.live import LiveSandbox

log = logging.getLogger(__name__)

WAITING_MAX = 64
LINGER_S = 10.0
"""How long a run goes on that nobody follows, so that who has lost a connection may come back."""

LINGER_LEAST_S = 0.5
"""Who has just asked for it needs a moment to begin to follow."""

INTERRUPT_TIMEOUT_S = 15.0
"""How long an interrupted run has to end before the next one is sent, which then waits in the kernel."""

DEFAULT_CONTEXT = "default"
RESET = "get_ipython().reset(new_session=False)"

Status = Literal["ok", "error", "interrupted", "timeout", "failed"]


class Run:
    """One piece of code: what it was asked for, what it shows, and how it ended."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        """Nothing runs yet.

        Raises:
            InvalidRequestError: Something in the body is not of its form.
        """
        self.id = checks.new_id(body)
        self.code = checks.text(body, "code")
        self.context = checks.context_id({"id": body.get("context", DEFAULT_CONTEXT)}, DEFAULT_CONTEXT)
        self.timeout_s = checks.seconds(body, "timeout_s")
        self.linger_s = checks.seconds(body, "linger_s", LINGER_S, zero=True)
        self.env = checks.environment(body)
        self.env_stays = checks.flag(body, "env_stays", True)
        self.asked = checks.fingerprint(body)
        self.output = Output()
        self.state: Literal["waiting", "running", "ended"] = "waiting"
        self.status: Status | None = None
        self.error: errors.WarmcellError | None = None
        self.execution_count: int | None = None
        self.started_at = time.time()
        self.ended_at: float | None = None
        self.work: asyncio.Task[None] | None = None
        self.request = uuid.uuid4().hex
        """By which the kernel knows it."""
        self._cut: tuple[Status, errors.WarmcellError | None] | None = None

    def info(self) -> dict[str, Any]:
        """RunInfo."""
        return {
            "id": self.id,
            "context": self.context,
            "state": self.state,
            "status": self.status,
            "error": None if self.error is None else self.error.to_json(),
            "execution_count": self.execution_count,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "output": self.output.next,
        }

    @property
    def is_cut(self) -> bool:
        """Whether it is being interrupted, or was."""
        return self._cut is not None

    def cut(self, status: Status, error: errors.WarmcellError | None = None) -> None:
        """It is interrupted, for this reason."""
        self._cut = (status, error)

    def end(self, status: Status, error: errors.WarmcellError | None = None) -> None:
        """It is over. Idempotent."""
        if self._cut is not None and status == "error":  # That is what being interrupted looks like.
            status, error = self._cut
        if self.state != "ended":
            self.state, self.status, self.error, self.ended_at = "ended", status, error, time.time()
            self.code, self.env = "", {}  # They may be many megabytes, and what has ended is remembered.
            self.output.end()


class KernelRuns:
    """The runs of one sandbox, one after another in each of its contexts; and these.

    The default context is the kernel itself, each other one a process below it.
    """

    def __init__(
        self,
        box: Callable[[], LiveSandbox],
        client: Callable[[], Awaitable[KernelClient]],
        interrupt: Callable[[], Awaitable[None]],
        contexts: Mapping[str, str],
        note: Callable[[Mapping[str, str]], None],
    ) -> None:
        """Nothing runs yet.

        Args:
            box: The sandbox as it is now.
            client: A client of its kernel, which lives.
            interrupt: Interrupts what the kernel does.
            contexts: Those that there are, id to directory, apart from the default one.
            note: Told of its contexts, for its snapshots.
        """
        self._box = box
        self._client = client
        self._interrupt = interrupt
        self._known: dict[str, Run] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        """By context: held by the run that has its turn."""
        self._note = note
        self._closing = False
        self._env: dict[str, str] = {}
        self._told: set[str] = set()
        """Contexts that know these variables."""
        self.contexts: dict[str, str] = {DEFAULT_CONTEXT: "", **contexts}
        """Id to the directory in which it began."""

    def tell(self, env: Mapping[str, str]) -> None:
        """Have these variables be the same in all contexts from the next run on."""
        self._env = dict(env)
        self._told.clear()

    @property
    def busy(self) -> bool:
        """Whether any has not ended."""
        return any(one.state != "ended" for one in self._known.values())

    @property
    def in_use(self) -> bool:
        """Whether the kernel is being talked with."""
        return self.busy or any(turn.locked() for turn in self._turns.values())

    def all(self) -> list[Run]:
        """Those that run or wait, and those whose output is kept, the oldest first."""
        return [one for one in self._known.values() if not one.output.forgotten]

    def get(self, run_id: str) -> Run:
        """One of them.

        Raises:
            NotFoundError: There is none of that id.
        """
        found = self._known.get(run_id)
        if found is None:
            raise errors.NotFoundError(f"There is no run {run_id}", hint="It ended long ago, or never began.")
        return found

    def known(self, body: Mapping[str, Any]) -> Run | None:
        """The one that the same request has started already.

        Raises:
            ConflictError: Another request has, under this id.
        """
        found = self._known.get(str(body.get("id"))) if body.get("id") is not None else None
        if found is not None and found.asked != checks.fingerprint(body):
            raise errors.ConflictError(f"Run {found.id} is another one", hint="Take a new id for new code.")
        return found

    def start(self, body: Mapping[str, Any]) -> Run:
        """Have it run when those before it have ended, unless this very request has begun already.

        Raises:
            InvalidRequestError: It makes no sense.
            NotFoundError: There is no such context.
            CapacityError: Too many wait.
        """
        run = self.known(body)
        if run is None:
            run = Run(body)
            self._context(run.context)
            if sum(one.state != "ended" for one in self._known.values()) >= WAITING_MAX:
                raise errors.CapacityError(f"{WAITING_MAX} runs wait in this sandbox", hint="Wait until one has ended.")
            self._known[run.id] = run
            run.work = asyncio.create_task(self._work(run))
            run.work.add_done_callback(lambda done: forget_oldest(self._known))
        return run

    async def stop(self, run: Run) -> None:
        """Interrupt it, or have it never begin. Idempotent."""
        if run.work is not None and run.state != "ended":
            if not run.is_cut:  # Else it is being interrupted already, and is to be given its time.
                run.work.cancel()
            await asyncio.wait({run.work}, timeout=INTERRUPT_TIMEOUT_S + 1)

    async def new_context(self, body: Mapping[str, Any], default: str) -> dict[str, str]:
        """A context with no variables, whose process is up.

        Raises:
            ConflictError: There is one of that id, or there are too many.
            InvalidRequestError: It cannot begin in that directory.
        """
        name, cwd = checks.context_id(body, default), checks.text(body, "cwd", "")
        if name in self.contexts:
            raise errors.ConflictError(f"There is a context {name!r} already", hint="Use it, or take another id.")
        self.contexts[name] = cwd
        try:
            await (await self._client()).start(_guests(name, cwd), self._box())
        except BaseException:
            self.contexts.pop(name, None)
            raise
        self._note(self._others())
        return {"id": name, "cwd": cwd}

    async def restart_context(self, name: str) -> dict[str, str]:
        """Have it begin anew, without its variables; what runs in it is ended.

        The default context is the kernel's own process, which the others hang on: it is interrupted and emptied.

        Raises:
            NotFoundError: There is no such context.
        """
        cwd = self._context(name)
        if name != DEFAULT_CONTEXT:
            await self._end_context(name)
            await (await self._client()).start(_guests(name, cwd), self._box())
            return {"id": name, "cwd": cwd}
        running = [one for one in self._known.values() if one.context == name and one.state != "ended"]
        await asyncio.gather(*(self.stop(one) for one in running))
        async with self._turn(name):
            await self._silently(await self._client(), RESET)
        return {"id": name, "cwd": cwd}

    async def remove_context(self, name: str) -> None:
        """End its process, and what runs there. The default one stays.

        Raises:
            NotFoundError: There is no such context.
            ConflictError: It is the default one.
        """
        if name == DEFAULT_CONTEXT:
            raise errors.ConflictError("The default context stays", hint="Restart it to be rid of its variables.")
        self._context(name)
        await self._end_context(name)
        self.contexts.pop(name, None)
        self._note(self._others())

    def abandon(self, error: errors.WarmcellError) -> None:
        """Those that have not ended are told this, since the sandbox sleeps. What has begun goes on when it wakes."""
        for run in self._known.values():
            if run.state != "ended" and run.work is not None:
                run.end("failed", error)
                run.work.cancel()

    async def close(self) -> None:
        """Follow them no more: the sandbox is gone, or is saved with what runs in it."""
        self._closing = True
        work = [one.work for one in self._known.values() if one.work is not None]
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    def _turn(self, context: str) -> asyncio.Lock:
        return self._turns.setdefault(context, asyncio.Lock())

    def _others(self) -> dict[str, str]:
        return {name: cwd for name, cwd in self.contexts.items() if name != DEFAULT_CONTEXT}

    async def _end_context(self, name: str) -> None:
        """What it runs ends as interrupted, since its kernel says so of what it gives up."""
        client = await self._client()
        await client.end(name)
        self._told.discard(name)

    async def _interrupt_run(self, run: Run) -> None:
        if run.context == DEFAULT_CONTEXT:
            await self._interrupt()
        else:
            await (await self._client()).interrupt(run.context, run.request)

    def _context(self, name: str) -> str:
        if name not in self.contexts:
            raise errors.NotFoundError(f"There is no context {name!r}", hint="Make one first, or leave it out.")
        return self.contexts[name]

    async def _work(self, run: Run) -> None:
        """Run it, for as long as it may and somebody wants it."""
        lingering = asyncio.create_task(self._deserted(run))
        running = asyncio.create_task(self._in_turn(run))
        try:
            async with asyncio.timeout(run.timeout_s):
                await asyncio.wait({running, lingering}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            else:
                await self._cut_short(run, running, "interrupted")
        except TimeoutError:
            late = errors.OperationTimeoutError(
                f"The code did not end within {run.timeout_s:g} s and was interrupted",
                hint="Give it a longer timeout, or less to do.",
                details={"operation": "run", "timeout": run.timeout_s},
            )
            await self._cut_short(run, running, "timeout", late)
        except asyncio.CancelledError:
            await self._cut_short(run, running, "interrupted")
        except errors.WarmcellError as error:
            run.end("failed", error)
        except Exception as error:
            log.info("a sandbox's kernel broke the protocol", exc_info=error)
            run.end(
                "failed",
                errors.ProtocolError(
                    f"The kernel said something that is no message ({type(error).__name__})", hint="Run it again."
                ),
            )
        finally:
            for task in (lingering, running):
                task.cancel()
            await asyncio.gather(lingering, running, return_exceptions=True)
            run.end("failed", errors.ConflictError("The sandbox has ended", hint="Start another one."))

    async def _cut_short(
        self, run: Run, running: "asyncio.Task[None]", status: Status, error: errors.WarmcellError | None = None
    ) -> None:
        """Interrupt it, and hear its last words. How it ended stays so, whatever happens meanwhile."""
        try:
            if run.state == "running" and not self._closing:
                run.cut(status, error)
                with contextlib.suppress(errors.WarmcellError):
                    await self._interrupt_run(run)
                await asyncio.wait({running}, timeout=INTERRUPT_TIMEOUT_S)
        finally:
            run.end(status, error)

    async def _deserted(self, run: Run) -> None:
        """Wait until nobody has followed it for as long as it goes on without anybody."""
        while True:
            since, linger_s = run.output.deserted_since, run.linger_s
            if since is None or linger_s is None:
                await run.output.changed()
                continue
            left = since + max(linger_s, LINGER_LEAST_S) - time.monotonic()
            if left <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    while run.output.deserted_since == since:
                        await run.output.changed()

    async def _in_turn(self, run: Run) -> None:
        async with self._turn(run.context):
            run.state, run.started_at = "running", time.time()
            client = await self._client()
            env = {**({} if run.context in self._told else self._env), **(run.env if run.env_stays else {})}
            self._told.add(run.context)
            if run.is_cut:  # While its kernel started.
                return
            try:
                await self._follow(run, self._messages(client, run, env))
            except errors.SandboxDiedError:  # The next one begins with the variables of the kernel.
                self._told.discard(run.context)
                raise

    async def _follow(self, run: Run, shown: AsyncGenerator[dict[str, Any]]) -> None:
        async with contextlib.aclosing(shown) as messages:
            async for message in messages:
                if message["msg_type"] == "reply":
                    content = message["content"]
                    run.execution_count = content.get("execution_count")
                    status: Status = "ok" if content["status"] == "ok" else "error"
                    run.end("interrupted" if content["status"] == "aborted" else status)
                else:
                    await run.output.put(message)

    async def _messages(self, client: KernelClient, run: Run, env: Mapping[str, str]) -> AsyncGenerator[dict[str, Any]]:
        lent = None if run.env_stays else run.env
        if run.context != DEFAULT_CONTEXT:
            context = _guests(run.context, self._context(run.context))
            messages = client.execute_in(context, run.code, self._box(), name=run.request, env=env, lent=lent)
        else:
            if env:
                await self._silently(client, f"__import__('os').environ.update({dict(env)!r})")
            messages = client.execute(run.code, self._box(), lent=lent)
        async with contextlib.aclosing(messages):
            async for message in messages:
                yield message

    async def _silently(self, client: KernelClient, code: str) -> None:
        """Run something of ours in the default context.

        Raises:
            SandboxDiedError: The kernel has ended.
        """
        async with contextlib.aclosing(client.execute(code, self._box(), silent=True)) as messages:
            async for _ in messages:
                pass


def _guests(name: str, cwd: str) -> dict[str, str]:
    """A context, as the guest knows it."""
    return {"context": name, "cwd": cwd}
