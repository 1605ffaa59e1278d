"""A real ipykernel with unsigned sockets that can be paused: `python saved_kernel.py CONNECTION_FILE`.

Its part in it is the least that the host's side needs: hold output from the answer on, let it go to a new subscriber.
"""

import sys
import threading
from typing import Any

import zmq
from ipykernel import kernelapp
from ipykernel.iostream import IOPubThread

DELIMITER = b"<IDS|MSG>"


class Holding(IOPubThread):
    """Keeps what is published between `hold` and the next subscription."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kept: list[Any] = []
        self.holding = False
        super().__init__(*args, **kwargs)
        self.socket.setsockopt(zmq.XPUB_VERBOSER, 1)
        self.socket.setsockopt(zmq.XPUB_NODROP, 1)

    def hold(self) -> None:
        """From now on, behind all that was published."""
        held = threading.Event()

        def do() -> None:
            self.holding = True
            held.set()

        self.schedule(do)
        held.wait()

    def _handle_subscription(self, frames: Any) -> None:
        super()._handle_subscription(frames)
        if any(frame[:1] == b"\x01" for frame in frames):
            self.holding = False
            while self.kept:
                super()._really_send(self.kept.pop(0))

    def _really_send(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        if self.holding and b"warmcell_" not in bytes(msg[msg.index(DELIMITER) + 3]):
            self.kept.append([bytes(frame) for frame in msg])
        else:
            super()._really_send(msg, *args, **kwargs)


def main() -> None:
    """Serve until killed."""
    kernelapp.IOPubThread = Holding  # type: ignore[misc]
    app = kernelapp.IPKernelApp.instance()
    app.initialize(["-f", sys.argv[1], "--HistoryManager.enabled=False"])
    kernel, seen = app.kernel, {"token": ""}

    def answering(kind: str, handler: Any) -> None:
        def handle(stream: Any, identities: Any, request: Any) -> None:
            try:
                content = {"status": "ok", **handler(request["content"])}
            except Exception as error:
                content = {"status": "error", "ename": type(error).__name__, "evalue": str(error)}
            kernel.session.send(stream, f"warmcell_{kind}_reply", content, request, ident=identities)

        kernel.control_handlers[f"warmcell_{kind}_request"] = handle

    def before_snapshot(content: Any) -> dict[str, Any]:
        for veto in app.shell.user_ns.get("vetoes", ()):
            raise RuntimeError(veto)
        seen["token"] = content["token"]
        app.iopub_thread.hold()
        return {}

    def after_restore(content: Any) -> dict[str, Any]:
        if content["token"] != seen["token"]:
            raise ValueError("not the one that was saved")
        app.shell.user_ns["restored"] = content
        return {"token": content["token"]}

    answering("before_snapshot", before_snapshot)
    answering("after_restore", after_restore)
    answering("go_on", lambda content: {})
    app.start()


if __name__ == "__main__":
    main()
