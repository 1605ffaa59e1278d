"""One kernel of a sandbox as the keeper has it, its only client: begun or joined, asked, interrupted, ended."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from warmcell.extension.keeper.death import death
from warmcell.extension.keeper.kernel import Kernel
from warmcell.extension.keeper.rank_client import RankClient
from warmcell.extension.keeper.rank_steps import Execution, LostError, Step
from warmcell.extension.keeper.ranks import Rank, share
from warmcell.kernel_provisioner.proxy.wire import MalformedMessageError
from warmcell.sandbox import errors
from warmcell.sandbox.gpus.environment import environment as gpu_environment
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.told import MORE_MEMORY

READY_TIMEOUT_S = 60.0
INTERRUPT_TIMEOUT_S = 15.0
"""How long a cell that nobody waits for any more has to end before its kernel is killed."""

KILL_TIMEOUT_S = 10.0

HANG_UP_TIMEOUT_S = 10.0
"""A kernel that has hung up is about to end."""

MORE_MEMORY_FOR_RANKS = "Ask for more with memory=, as in memory=8GiB, or load less at a time."


@dataclass
class Runner:
    """The keeper's own connection to one kernel of a sandbox."""

    client: RankClient
    process: KernelProcess
    box: LiveSandbox
    oom_before: int
    rank: Rank
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One cell at a time, as in any kernel."""
    instead: str = ""
    """How the kernel ended that was here before; empty once that has been said."""
    deaf: bool = False
    """It was killed, as it did not stop when it was interrupted."""

    def __post_init__(self) -> None:
        self._follows = asyncio.create_task(self._hang_up())

    @property
    def is_of_use(self) -> bool:
        """Whether it lives, and can be asked."""
        return self.process.alive and not self.client.ended

    async def execute(self, step: Step) -> AsyncGenerator[dict[str, Any]]:
        """Messages of one request, last its reply; then nothing of it is still to come.

        Raises:
            SandboxDiedError: It has ended, or is of no use any more.
        """
        execution = Execution(self.client, step)
        try:
            async with contextlib.aclosing(execution.messages()) as messages:
                async for message in messages:
                    yield message
            assert execution.reply is not None
            yield {"msg_type": "reply", "content": execution.reply, "metadata": {}}
        except LostError:
            raise await self.lost() from None
        except MalformedMessageError as error:
            raise errors.ProtocolError(
                f"The remote kernel says what nobody understands: {error}", hint="Run the cell again."
            ) from error
        finally:
            if execution.reply is None and self.process.alive:  # whoever asked has gone
                with contextlib.suppress(errors.WarmcellError):
                    await self.box.signal_process(self.process, 2)
                await _within(execution.end(), INTERRUPT_TIMEOUT_S)
                if execution.reply is None and self.process.alive:  # Every later cell would wait behind this one.
                    self.deaf = True
                    await self.kill()

    async def answers(self) -> None:
        """Wait until it answers and its iopub reaches us.

        Raises:
            OperationTimeoutError: It does not.
            SandboxDiedError: It hangs up.
        """
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self.client.answers()
        except errors.TransportError:
            raise await self.lost() from None
        except TimeoutError as error:
            raise errors.OperationTimeoutError(
                f"The remote kernel did not answer within {READY_TIMEOUT_S:.0f} s",
                hint="Try again on a less busy machine.",
                details={"operation": "remote kernel start", "timeout": READY_TIMEOUT_S},
            ) from error

    async def lost(self) -> errors.WarmcellError:
        """The error for one that has hung up; if it lives on it is of no use, and is ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANG_UP_TIMEOUT_S):
                await self.process.exited.wait()
        if self.process.alive:
            await self.kill()
        return self.died()

    async def kill(self) -> None:
        """End its process, and wait for that, but not for ever."""
        with contextlib.suppress(errors.WarmcellError):
            await self.box.signal_process(self.process, 9)
        await _within(self.process.exited.wait(), KILL_TIMEOUT_S)

    def died(self) -> errors.WarmcellError:
        """The error that says how it ended."""
        who = "The remote kernel" if self.rank.of == 1 else f"Rank {self.rank.number}"
        if self.deaf:
            return errors.SandboxDiedError(
                f"{who} did not stop within {INTERRUPT_TIMEOUT_S:.0f} s when it was interrupted, and was killed",
                hint="Let it react to an interrupt, or give it more time.",
            )
        return death(
            self.process.exit_code or 0,
            oom_killed=self.box.oom_kills() > self.oom_before,
            spec=self.box.spec,
            more_memory=MORE_MEMORY if self.box.info.kernel_id else MORE_MEMORY_FOR_RANKS,
            who=who,
            again="Run the cell again",
            sharing=1 if self.box.info.kernel_id else self.rank.of,
        )

    def close(self) -> None:
        """Let go of it. Idempotent."""
        self._follows.cancel()
        self.client.close()

    async def _hang_up(self) -> None:
        await self.process.exited.wait()
        self.client.finish()


async def join(box: LiveSandbox, kernel: Kernel, rank: Rank) -> Runner:
    """A clone runs already; it is reached as all its clients reach it, so what it does counts as work.

    Raises:
        SandboxDiedError: It has ended.
    """
    if kernel.process is None or not kernel.process.alive:
        raise errors.SandboxDiedError(
            f"Rank {rank.number} has ended with its clone", hint="Run the cell again, which makes other clones."
        )
    connection = kernel.request.connection
    client = RankClient(str(connection["ip"]), key=str(connection["key"]))
    runner = Runner(client, kernel.process, box, box.oom_kills(), rank)
    try:
        await runner.answers()
    except BaseException:
        runner.close()
        raise
    return runner


async def start(
    service: SandboxService,
    box: LiveSandbox,
    rank: Rank,
    *,
    env: Mapping[str, str],
    in_use: Callable[[LiveSandbox], None],
) -> Runner:
    """Start one that answers, with what is the rank's own in its environment.

    Args:
        service: Whose sandbox it is.
        box: Where.
        rank: Which of its kernels.
        env: What a rank is told.
        in_use: Told of the sandbox once its kernel runs.

    Raises:
        WarmcellError: It cannot be started, or ends.
    """
    began = time.perf_counter()
    sandbox_id, oom_before = box.info.id, box.oom_kills()
    env = {**env, **await box.network_environment(), **box.spec.env, **gpu_environment(share(box.gpus, rank))}
    cwd = box.spec.workspace.path if box.spec.workspace and box.spec.workspace.mode != "none" else ""
    if rank.number == 0:
        process = await service.start_kernel(sandbox_id, env=env, cwd=cwd)
    else:
        process = await box.start_beside(env=env, cwd=cwd)
    runner = Runner(RankClient(str(process.socket_prefix)), process, box, oom_before, rank)
    try:
        in_use(box)
        if process.token:  # It has been up for a while, and waits for somebody to become.
            become = {"token": process.token, "clone": True, "env": env, "cwd": cwd}
            await runner.client.ask("warmcell_after_restore_request", become, timeout_s=READY_TIMEOUT_S)
            process.token = ""
        await runner.answers()
        if rank.number == 0:
            service.kernel_ready(sandbox_id, started_ms=1000 * (time.perf_counter() - began))
    except BaseException as error:
        runner.close()
        with contextlib.suppress(errors.WarmcellError):
            await box.signal_process(process, 9)
        if isinstance(error, errors.TransportError):
            raise await runner.lost() from None
        raise
    return runner


async def _within(what: Coroutine[Any, Any, object], timeout_s: float) -> None:
    """Wait for something, but not for ever; where one was cancelled `asyncio.timeout` takes its end for that."""
    work = asyncio.ensure_future(what)
    await asyncio.wait({work}, timeout=timeout_s)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
