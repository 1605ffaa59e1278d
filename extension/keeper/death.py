"""Why a kernel ended by itself, in words."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

from warmcell.sandbox.errors import SandboxDiedError, TransportError
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.models import GIB, SandboxSpec
from warmcell.sandbox.told import MORE_MEMORY

KILLED = 128 + signal.SIGKILL
KNOWN_S = 1.0
"""The end of a kernel is known so long after what it had open has closed, on a busy machine."""


def death(
    exit_code: int,
    *,
    oom_killed: bool,
    spec: SandboxSpec,
    who: str = "The kernel",
    when: str = "by itself",
    more_memory: str = MORE_MEMORY,
    again: str = "Restart it",
    sharing: int = 1,
) -> SandboxDiedError:
    """The error for a kernel with this exit code.

    Args:
        exit_code: As a shell says it: 128 + n for death by signal n.
        oom_killed: Whether anything in its sandbox was killed for memory while it ran.
        spec: What its sandbox was given.
        who: Begins the sentence.
        when: Says when it ended.
        more_memory: What to do where it was killed for memory.
        again: What to do else.
        sharing: How many ranks have the memory of its sandbox together.
    """
    killed_for_memory = oom_killed and exit_code == KILLED
    details = {"exit_code": exit_code, "oom_killed": killed_for_memory}
    if killed_for_memory:
        cap = spec.limits.memory_bytes
        whose = "its cap" if sharing == 1 else f"the cap of all {sharing} ranks together"
        of = f" ({whose} is {cap / GIB:.1f} GiB)" if cap else ""
        return SandboxDiedError(f"{who} was killed for memory{of}", hint=more_memory, details=details)
    name = f" ({signal.Signals(exit_code - 128).name})" if exit_code - 128 in set(signal.Signals) else ""
    return SandboxDiedError(
        f"{who} ended {when} with exit code {exit_code}{name}",
        hint=f"{again}; if it happens again, the last cell's native code is the first suspect.",
        details=details,
    )


async def unless_dead(process: KernelProcess, what: Coroutine[Any, Any, None]) -> None:
    """Do something with a kernel, but no longer than it lives.

    Raises:
        SandboxDiedError: It ended meanwhile.
    """
    work, exited = asyncio.create_task(what), asyncio.create_task(process.exited.wait())
    try:
        await asyncio.wait({work, exited}, return_when=asyncio.FIRST_COMPLETED)
        failed = work.exception() if work.done() else None
        if isinstance(failed, TransportError):
            await asyncio.wait({exited}, timeout=KNOWN_S)
        if exited.done() and (failed is not None or not work.done()):
            raise SandboxDiedError("The kernel ended before it could go on", hint="Restart the kernel.") from failed
        work.result()
    finally:
        exited.cancel()
        if not work.done():  # Whoever gives up once it is done finds it done.
            work.cancel()
            await asyncio.wait({work})
