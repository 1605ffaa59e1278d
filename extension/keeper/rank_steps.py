"""What a run has its kernel do: values in, the cell, values out, in one request; and what comes of it."""

import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from warmcell.extension.keeper.rank_client import Heard, RankClient
from warmcell.kernel_provisioner.proxy.wire import Message

log = logging.getLogger(__name__)

SILENCE_S: Final = 10.0
"""Output of a cell that has ended may be late, or lost where it printed faster than anybody could read."""

REPLY_LATE_S: Final = 2.0
"""A kernel replies before it says that it is idle, on another socket."""

TEXT_MAX_BYTES: Final = 32 * 2**20
"""Text of one cell on one rank that goes on its way; what is beyond is left out, and counted."""

TRAVELS: Final = "warmcell"
"""What a request's content calls what goes with a cell."""

QUIET: Final = "quiet"
"""In that: what no rank's cell shows, as that it is busy, need not be said."""

COMMS: Final = ("comm_open", "comm_msg", "comm_close")
SHOWN: Final = frozenset(
    {"stream", "display_data", "update_display_data", "execute_result", "clear_output", "error", *COMMS}
)
"""iopub messages that belong to a cell's output; those of comms say how its widgets change."""

MEMORY_FIRST_S: Final = 1.0
"""How much memory it takes is not asked of what ends before that."""

MEMORY_PAUSE_S: Final = 2.0
MEMORY_PAUSE_TIMES: Final = 20
"""Of what an answer took: looking through a large kernel's memory takes its time."""


@dataclass(frozen=True, slots=True)
class Request:
    """A cell, and what travels with it."""

    code: str
    load: Mapping[str, Any] | None = None
    """What `values.load` is told, less where the files are."""
    get: Sequence[str] = ()
    last: str = ""
    """What the value of its last line is called among the values that come back; empty: it stays there."""


@dataclass(frozen=True, slots=True)
class Step:
    """One execute request."""

    code: str
    travels: Mapping[str, Any] = field(default_factory=dict)
    """What the kernel loads before, and dumps after it."""

    @property
    def again(self) -> "Step":
        """The same where all but the dump has been done."""
        return Step("", {"dump": self.travels["dump"]})


def step_of(request: Request, guest: str, values: Path, most_bytes: int) -> Step | None:
    """Values in, the cell, values out; None where there is nothing to do.

    Args:
        request: What is asked for.
        guest: The run directory, as the guest sees it.
        values: What comes back goes into a file of this name there.
        most_bytes: That may come back.
    """
    travels: dict[str, Any] = {}
    if request.load is not None:
        travels["load"] = {**request.load, "directory": guest}
    if request.get or request.last:
        out = f"{guest}/{values.name}"
        travels["dump"] = {"names": list(request.get), "path": out, "last": request.last, "limit": most_bytes}
    return Step(request.code, travels) if request.code or travels else None


LOST: Final[Mapping[str, Any]] = {
    "msg_type": "stream",
    "content": {
        "name": "stderr",
        "text": "[The end of this output was lost: there was too much at once. Write it to a file, or show less.]\n",
    },
    "metadata": {},
}
"""What is said instead of the end of some output that never came."""

_TOO_LARGE: Final[Mapping[str, Any]] = {
    "status": "error",
    "ename": "MessageTooLarge",
    "evalue": "The answer of the cell is too large: nobody knows how it ended.",
    "traceback": [],
}


class LostError(Exception):
    """The kernel has ended, or hung up, before its answer."""


@dataclass
class Execution:
    """One step on a rank."""

    client: RankClient
    step: Step
    text_max_bytes: int = TEXT_MAX_BYTES
    reply: Mapping[str, Any] | None = None
    """Its content, once it has come."""
    _sent: str = ""
    _idle: bool = False
    _told: bool = False
    """Its error was published."""
    _text_bytes: int = 0
    _left_out_bytes: int = 0
    _memory_asked: str = ""
    _memory_asked_at: float = 0.0
    _memory_at: float = 0.0

    async def messages(self) -> AsyncGenerator[dict[str, Any]]:
        """What it shows, until its reply is there and nothing of it is still to come.

        Raises:
            LostError: There will be no reply.
            MalformedMessageError: It says what nobody understands.
        """
        content = {
            "code": self.step.code,
            "silent": not self.step.code,
            "store_history": False,
            "user_expressions": {},
            "allow_stdin": False,
            "stop_on_error": False,  # What comes next may come while the kernel still empties its queue.
        }
        travels = {**self.step.travels, **({QUIET: True} if self.client.alone else {})}
        if travels:
            content[TRAVELS] = travels
        self._sent = self.client.request("shell", "execute_request", content)
        self._memory_at = 0.0 if not self.step.code else time.monotonic() + MEMORY_FIRST_S
        until = 0.0
        while not (self._idle and self.reply is not None):
            if not until and (self._idle or self.reply is not None):
                until = time.monotonic() + (REPLY_LATE_S if self._idle else SILENCE_S)
            heard = await self.client.hear(until or self._memory_at or None)
            if heard is None:
                if self.client.ended and self.reply is None:
                    raise LostError
                if until and (self.client.ended or time.monotonic() >= until):
                    if self._lost_its_end():
                        yield dict(LOST)
                    break
                self._ask_memory()
            elif heard.channel == "control":
                usage = self._memory(heard)
                if usage:
                    yield usage
            elif heard.parent == self._sent:
                until = 0.0
                for message in self._taken(heard):
                    yield message
        if self._left_out_bytes:
            yield _stream(f"\n[{self._left_out_bytes / 2**20:.1f} MiB more of output are left out]\n")
        assert self.reply is not None
        if (
            self.reply.get("status") == "error" and not self._told
        ):  # Of groups of exceptions only the text is published.
            step = self.reply.get("step", "cell")
            yield {"msg_type": "error", "content": self.reply, "metadata": {}, "step": step}

    def _lost_its_end(self) -> bool:
        """It has ended, and half of what says so does not come: an interrupt at the wrong moment takes a reply.

        Whether output may be lost.
        """
        if self.reply is None:
            text = "The cell was interrupted"
            self.reply = {"status": "error", "ename": "KeyboardInterrupt", "evalue": text, "traceback": [text]}
            return False
        log.warning("the end of a remote cell's output was lost")
        return True

    async def end(self) -> None:
        """Wait for its reply, whatever else it shows; raises as `messages`."""
        while self.reply is None:
            heard = await self.client.hear()
            if heard is not None and heard.parent == self._sent:
                self._taken(heard)
            elif heard is None and self.client.ended:
                raise LostError

    def _taken(self, heard: Heard) -> list[dict[str, Any]]:
        """What of a message is to be shown."""
        message = heard.message
        kind, _ = message.read_header()
        if heard.channel == "shell":
            if kind == "execute_reply":
                self.reply = _TOO_LARGE if heard.left_out_bytes else message.read_content()
            return []
        if kind == "status":
            self._idle = self._idle or message.read_content().get("execution_state") == "idle"
            return []
        if kind not in SHOWN:
            return []
        if heard.left_out_bytes:
            self._left_out_bytes += heard.left_out_bytes
            return []
        if kind == "stream":
            size, left = len(message.content), max(0, self.text_max_bytes - self._text_bytes)
            self._text_bytes += size
            if size > left:
                self._left_out_bytes += size - left
                return [self._beginning(message, left)] if left else []
        self._told = self._told or kind == "error"
        return [{"msg_type": kind, "content": message.read_content(), "metadata": message.read_metadata()}]

    @staticmethod
    def _beginning(message: Message, most: int) -> dict[str, Any]:
        content = message.read_content()
        return {"msg_type": "stream", "content": {**content, "text": str(content.get("text"))[:most]}, "metadata": {}}

    def _ask_memory(self) -> None:
        """Ask what the kernel takes, when it is time; one that does not answer is not asked again."""
        if self._memory_at and time.monotonic() >= self._memory_at:
            self._memory_asked, self._memory_asked_at = (
                self.client.request("control", "usage_request", {}),
                time.monotonic(),
            )
            self._memory_at = 0.0

    def _memory(self, heard: Heard) -> dict[str, Any] | None:
        """A message with `memory_bytes`, of the kernel and all its children, as it tells in every backend."""
        if heard.parent != self._memory_asked:
            return None
        now = time.monotonic()
        self._memory_at = now + max(MEMORY_PAUSE_S, MEMORY_PAUSE_TIMES * (now - self._memory_asked_at))
        memory = heard.message.read_content().get("kernel_memory")
        if isinstance(memory, (int, float)) and memory > 0:
            return {"msg_type": "usage", "content": {"memory_bytes": int(memory)}, "metadata": {}}
        return None


def _stream(text: str) -> dict[str, Any]:
    return {"msg_type": "stream", "content": {"name": "stderr", "text": text}, "metadata": {}}
