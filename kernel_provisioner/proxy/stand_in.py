"""Who answers for a kernel that is suspended: what a page asks by itself, so that a refresh wakes nothing."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from warmcell.kernel_provisioner.proxy.requests import RequestChannel
from warmcell.kernel_provisioner.proxy.wire import Author, MalformedMessageError, Message

_UNANSWERED: Final = frozenset({"usage_request"})
"""Asked every few seconds by a meter, which bears to hear nothing."""

_PATIENT: Final = frozenset({"create_subshell_request", "list_subshell_request", "delete_subshell_request"})
"""Asked by a page that is loaded, long before it needs them."""

_WIDGETS: Final = "jupyter.widget.control"
"""The comm by which a page that is loaded looks for widgets; it goes on without an answer after some seconds."""


class StandIn:
    """Active while a kernel is suspended. Called in the relay's thread."""

    def __init__(
        self,
        author: Author,
        reply: Callable[[RequestChannel, Message], None],
        publish: Callable[[Message], None],
    ) -> None:
        self.active = False
        self.info: dict[str, Any] | None = None
        """The content of the kernel's own kernel_info reply."""
        self.comms: dict[str, Any] = {}
        """Its comms, by id, as in its comm_info reply: whatever it has said."""
        self._author = author
        self._reply = reply
        self._publish = publish
        self.may_wake = True
        """Nobody was woken yet."""
        self._wake: Callable[[], None] | None = None
        self._patient_comms: set[str] = set()
        self._on_shutdown: Callable[[bool], None] | None = None
        self._on_look: Callable[[], None] | None = None
        self._on_interrupt: Callable[[], None] | None = None

    def begin(
        self,
        *,
        on_wake: Callable[[], None],
        on_shutdown: Callable[[bool], None] | None,
        on_look: Callable[[], None] | None = None,
        on_interrupt: Callable[[], None] | None = None,
    ) -> None:
        """The kernel is suspended. All are called in the relay's thread, `on_wake` once while `may_wake`."""
        self.active = True
        self._wake, self._on_shutdown, self._on_look = on_wake, on_shutdown, on_look
        self._on_interrupt = on_interrupt
        self.may_wake = True

    def end(self) -> None:
        """The kernel is there again, or gone for good."""
        self.active = False
        self._wake = self._on_shutdown = self._on_look = self._on_interrupt = None
        self._patient_comms.clear()

    def wake(self) -> None:
        """Something waits that only the kernel can do."""
        if self.may_wake and self._wake is not None:
            self.may_wake = False
            self._wake()

    def wakes(self, kind: str, request: Message) -> bool:
        """Whether a request that is not answered here has the kernel woken, or waits until another one does."""
        if kind in _PATIENT:
            return False
        if kind not in ("comm_open", "comm_msg", "comm_close"):
            return True
        content = _content_of(request)
        comm = content.get("comm_id")
        if not isinstance(comm, str):
            return True
        if kind == "comm_open" and content.get("target_name") == _WIDGETS:
            self._patient_comms.add(comm)
        return comm not in self._patient_comms

    def answers(self, channel: RequestChannel, kind: str, request: Message) -> bool:
        """Answer a request if that can be done without the kernel, with the statuses around it."""
        if kind in _UNANSWERED:
            return True
        content = self._content(kind, request)
        if content is None:
            return False
        self._say("busy", request)
        reply = kind.removesuffix("_request") + "_reply"
        self._reply(channel, self._author.answer(reply, content, request, to_asker=True))
        self._say("idle", request)
        if kind == "kernel_info_request" and self._on_look is not None:
            self._on_look()
        if kind == "interrupt_request" and self._on_interrupt is not None:
            self._on_interrupt()
        if kind == "shutdown_request" and self._on_shutdown is not None:
            self._on_shutdown(bool(content["restart"]))
        return True

    def _say(self, state: str, request: Message) -> None:
        self._publish(self._author.answer("status", {"execution_state": state}, request, to_asker=False))

    def _content(self, kind: str, request: Message) -> Mapping[str, Any] | None:
        if kind == "kernel_info_request":
            return self.info
        if kind == "comm_info_request":
            target = _content_of(request).get("target_name")
            comms = {
                name: comm
                for name, comm in self.comms.items()
                if isinstance(comm, dict) and target in (None, comm.get("target_name"))
            }
            return {"status": "ok", "comms": comms}
        if kind == "history_request":
            return {"status": "ok", "history": []}
        if kind == "interrupt_request":
            return {"status": "ok"}
        if kind == "shutdown_request":
            return {"status": "ok", "restart": bool(_content_of(request).get("restart"))}
        if kind == "debug_request":
            return _debug_info(_content_of(request))
        return None


def _content_of(request: Message) -> dict[str, Any]:
    try:
        return request.read_content()
    except MalformedMessageError:
        return {}


def _debug_info(asked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a kernel says whose debugger is not started; None for all else that a debugger is asked."""
    if asked.get("command") != "debugInfo":
        return None
    return {
        "type": "response",
        "request_seq": asked.get("seq", 0),
        "success": True,
        "command": "debugInfo",
        "body": {
            "isStarted": False,
            "hashMethod": "Murmur2",
            "hashSeed": 0,
            "tmpFilePrefix": "/tmp/ipykernel_0/",
            "tmpFileSuffix": ".py",
            "breakpoints": [],
            "stoppedThreads": [],
            "richRendering": True,
            "exceptionPaths": [],
            "copyToGlobals": True,
        },
    }
