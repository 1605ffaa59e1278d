"""The helper's main loop and its operations. Each request is served by a process of its own, which ends with it.

A request cannot harm another: what a process of the helper joins, opens or crashes on is its own. The loop itself
touches nothing that a caller sends.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import sys
import time

from warmcell.sandbox.helper import carrying, compacting, dump, linux, places, populate, probe, program, restore
from warmcell.sandbox.helper.busy import Busy
from warmcell.sandbox.helper.enter import Cancelled
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.shelf import ID, Shelf, full
from warmcell.sandbox.helper.wire import Conversation, peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from warmcell.sandbox.helper.maker import Maker
    from warmcell.sandbox.helper.places import Place

VERSION = "1"
"""Of the protocol."""
WORKERS_MAX = 64
WORKERS_OF_USER_MAX = 32
"""Of one user who is not root, so that others are served whatever that user does."""
THAW_TIMEOUT_S = 600.0
DRAIN_S = 120.0
BACKGROUND_NICE = 10


class Helper:
    """What all operations share: which criu, where images are, what criu knows of this machine."""

    def __init__(
        self,
        base: str,
        environment: Mapping[str, str],
        *,
        only: int | None = None,
        maker: Maker | None = None,
    ) -> None:
        """Configure it.

        Args:
            base: Directory of all images.
            environment: Where WARMCELL_CRIU and PATH are looked up.
            only: The one uid that it serves, besides root; everybody if None.
            maker: What makes sandboxes for ordinary users, if it does.
        """
        self.base = base
        self.only = only
        self.maker = maker
        self.busy = Busy()
        self._environment = environment
        self._program: program.Program | None = None
        self._operations: Mapping[str, Callable[[Conversation], None]] = {
            "hello": self._hello,
            "enroll": self._enroll,
            "dump": self._dump,
            "restore": self._restore,
            "populate": self._populate,
            "images": self._images,
            "drop": self._drop,
            "export": self._export,
            "import": self._import,
            "verify": self._verify,
            "create": self._create,
        }

    def program(self) -> program.Program:
        """The criu that is used. Looked for once it is needed, and again until there is one.

        Raises:
            HelperError: There is none.
        """
        if self._program is None:
            if os.getuid() != 0:
                raise HelperError(
                    "backend_unavailable",
                    "Memory snapshots need root",
                    hint="As root: `warmcell helper install`; it serves all users of the machine.",
                )
            self._program = program.find(self._environment)
            self._program.command()
        return self._program

    def prepare(self) -> None:
        """What is done once, before the first request, so that each worker has it. Nothing that fails is fatal."""
        with contextlib.suppress(HelperError):
            self.program()
        program.flags()
        if self.maker is not None:
            self.maker.prepare()

    def tidy(self) -> None:
        """Remove what an earlier helper that was killed has left, and finish what it had begun."""
        os.nice(BACKGROUND_NICE)
        for name in filter(str.isdigit, os.listdir(self.base) if os.path.isdir(self.base) else []):
            shelf = Shelf(self.base, int(name))
            shelf.clean()
            shelf.finish()

    def serve(self, conversation: Conversation) -> None:
        """Carry out one request, in a process of its own."""
        operation = conversation.text("op", choices=tuple(self._operations))
        if self.only is not None and conversation.uid not in (0, self.only):
            raise HelperError("sandbox_not_found", "This helper serves another user")
        self._operations[operation](conversation)

    def _shelf(self, conversation: Conversation) -> Shelf:
        store = conversation.text("store") if "store" in conversation.request else ""
        if store and not ID.fullmatch(store):
            raise HelperError("invalid_request", "That is no id of a store")
        return Shelf(self.base, conversation.uid, store=store)

    def _hello(self, conversation: Conversation) -> None:
        why_not, hint, version = "", "", ""
        try:
            found = self.program()
            version = found.version
            probe.check(found, self.base)
        except HelperError as error:
            why_not, hint = error.message, error.hint
        conversation.say(
            {
                "ok": True,
                "version": VERSION,
                "criu": version,
                "ready": not why_not,
                "why_not": why_not,
                "hint": hint,
                "kernel": program.release(),
                "cpu": program.flags(),
                "makes": self.maker is not None and not self.maker.why_not,
                "makes_why_not": "" if self.maker is None else self.maker.why_not,
            }
        )

    def _enroll(self, conversation: Conversation) -> None:
        place = self._place(conversation)
        template = conversation.request.get("template") is True
        dump.enroll(place, probe.cache(self.program(), self.base), template=template)
        conversation.say({"ok": True})

    def _dump(self, conversation: Conversation) -> None:
        place = self._place(conversation)
        then = conversation.text("then", choices=("stop", "go_on"))

        def stopped() -> None:
            conversation.say({"ok": True, "stopped": True})

        def frozen(renamed: bool) -> None:
            conversation.say({"ok": True, "frozen": True, "renamed": renamed})
            dump.wait_for_thaw(
                conversation.fileno(),
                lambda: (conversation.hear() or {}).get("thaw") is True,
                timeout_s=THAW_TIMEOUT_S,
            )

        shelf = self._shelf(conversation)
        draft, answer = dump.dump(
            self.program(),
            shelf,
            place,
            image=conversation.text("image"),
            guest_pid=conversation.number("pid"),
            then=then,
            nothing=probe.nothing(self.base),
            cache=probe.cache(self.program(), self.base),
            frozen=frozen,
            stopped=stopped if conversation.request.get("early") is True else None,
            reader=(conversation.uid, conversation.gid),
        )
        conversation.say({"ok": True, "image_bytes": draft.own_bytes(), **answer})
        conversation.close()
        # The image can be used already; the rest takes time and nobody waits for it.
        os.nice(BACKGROUND_NICE)
        with contextlib.suppress(FileNotFoundError):
            draft.finish()
        draft.close(keep=True)
        compacting.attend(shelf, draft.image)

    def _restore(self, conversation: Conversation) -> None:
        place = self._place(conversation)
        answer = restore.restore(
            self.program(),
            self._shelf(conversation),
            place,
            image=conversation.text("image"),
            nothing=probe.nothing(self.base),
            cache=probe.cache(self.program(), self.base),
            caller=conversation.fileno(),
        )
        conversation.say({"ok": True, **answer})

    def _populate(self, conversation: Conversation) -> None:
        parts = populate.needed(self._shelf(conversation), conversation.text("image"))
        conversation.say({"ok": True, "bytes": sum(length for _, _, length in parts)})
        conversation.close()
        os.nice(BACKGROUND_NICE)
        populate.read(parts)

    def _place(self, conversation: Conversation) -> Place:
        owns = None if self.maker is None else self.maker.owners.owns
        return places.identify(conversation.pidfd(), conversation.uid, owns)

    def _create(self, conversation: Conversation) -> None:
        if self.maker is None:
            raise HelperError("unsupported", "This helper makes no sandboxes", hint="Ask the system's.")
        self.program()  # A sandbox of its making is of use only if it can be saved.
        self.busy.for_long()
        self.maker.make(conversation, alive=self.busy.alive)

    def _images(self, conversation: Conversation) -> None:
        conversation.say({"ok": True, "images": self._shelf(conversation).images()})

    def _drop(self, conversation: Conversation) -> None:
        shelf = self._shelf(conversation)
        shelf.drop(conversation.text("image"))
        conversation.say({"ok": True})
        conversation.close()
        os.nice(BACKGROUND_NICE)
        shelf.clean()


    def _export(self, conversation: Conversation) -> None:
        carrying.hand_out(conversation, self._shelf(conversation), image=conversation.text("image"))

    def _import(self, conversation: Conversation) -> None:
        foreign = conversation.uid == 0 or self._environment.get(program.IMPORTS_VARIABLE) == "1"
        try:
            answer = carrying.take_in(
                conversation,
                self._shelf(conversation),
                image=conversation.text("image"),
                version=self.program().version,
                foreign=foreign,
            )
        except (HelperError, OSError) as error:
            problem = error if isinstance(error, HelperError) else full(error, self.base)
            if problem is not None:  # Said before the caller has sent all of it, and heard although it still sends.
                conversation.fail(problem)
                conversation.drain()
            raise
        conversation.say({"ok": True, **answer})

    def _verify(self, conversation: Conversation) -> None:
        conversation.say({"ok": True, **carrying.verify(self._shelf(conversation), image=conversation.text("image"))})


def serve(listening: socket.socket, helper: Helper, *, lifeline: int | None = None) -> None:
    """Serve requests until the lifeline closes or SIGTERM comes, then let running ones finish.

    Args:
        listening: A listening Unix stream socket.
        helper: What serves.
        lifeline: A descriptor whose other end closes when nobody needs the helper any more.
    """
    stop_reading, stop_writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(stop_writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    helper.prepare()
    waiting = select.poll()
    waiting.register(listening, select.POLLIN)
    waiting.register(stop_reading, select.POLLIN)
    if lifeline is not None:
        waiting.register(lifeline, select.POLLIN | select.POLLHUP)
    busy = helper.busy
    _worker(busy, helper.tidy, [listening], [stop_reading, stop_writing])
    while True:
        ready = dict(waiting.poll())
        if stop_reading in ready:
            received = os.read(stop_reading, 4096)
            _reap(busy)
            if signal.SIGTERM in received:
                break
        if lifeline is not None and lifeline in ready:
            break
        if listening.fileno() in ready:
            while busy.is_full(WORKERS_MAX):
                _reap(busy, wait=True)
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    uid = peer(connection)
                    if uid != 0 and busy.of_user(uid) >= WORKERS_OF_USER_MAX:
                        _refuse(connection)
                        continue
                    work = functools.partial(_converse, helper, connection)
                    _worker(busy, work, [listening], [stop_reading, stop_writing], uid=uid)
    listening.close()
    _drain(busy, stop_reading, busy.count)
    busy.let_go()
    _drain(busy, stop_reading, busy.holds)


def _refuse(connection: socket.socket) -> None:
    """Somebody has so many requests under way that others would wait for them."""
    problem = HelperError("capacity", "You have too many requests under way", hint="Wait for some of them to end.")
    connection.setblocking(False)
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps({"ok": False, **problem.to_json()}).encode() + b"\n")


def _drain(busy: Busy, stop_reading: int, left: Callable[[], int | bool]) -> None:
    """Let workers end, for a while."""
    deadline = time.monotonic() + DRAIN_S
    waiting = select.poll()
    waiting.register(stop_reading, select.POLLIN)
    _reap(busy)
    while left() and time.monotonic() < deadline:
        waiting.poll(1000)
        with contextlib.suppress(BlockingIOError):
            os.read(stop_reading, 4096)
        _reap(busy)


def _reap(busy: Busy, *, wait: bool = False) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, _ = os.waitpid(-1, 0 if wait else os.WNOHANG)
            if pid == 0:
                return
            busy.ended(pid)
            wait = False


def _worker(
    busy: Busy, work: Callable[[], None], listening: list[socket.socket], own: list[int], *, uid: int = 0
) -> None:
    """Start `work` in a process of its own, without what only the loop needs."""
    if busy.forked(uid) is not None:
        return
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for one in listening:
            one.close()
        for fd in own:
            os.close(fd)
        linux.name_process("warmcell-work")
        work()
        code = 0
    except BaseException as error:
        audit(f"worker failed: {type(error).__name__}: {error}")
    finally:
        os._exit(code)


def _converse(helper: Helper, connection: socket.socket) -> None:
    began = time.perf_counter()
    try:
        conversation = Conversation(connection)
    except (EOFError, OSError):
        return
    except HelperError as error:
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps({"ok": False, **error.to_json()}).encode() + b"\n")
        return
    outcome = "ok"
    try:
        helper.serve(conversation)
    except Cancelled:
        outcome = "the caller has gone"
    except HelperError as error:
        outcome = f"{error.code}: {error.message}"
        conversation.fail(error)
    except OSError as error:
        problem = full(error, helper.base) or HelperError(
            "snapshot_failed", f"The helper failed: {error}", hint="Its log says more."
        )
        outcome = f"{problem.code}: {problem.message}"
        conversation.fail(problem)
    request = conversation.request
    named = " ".join(f"{name}={request[name]!r}" for name in ("op", "id", "image", "pid", "then") if name in request)
    audit(f"uid={conversation.uid} {named} ms={1e3 * (time.perf_counter() - began):.0f} {outcome}")


def audit(line: str) -> None:
    """One line for each operation, on stderr: who asked for what and what came of it."""
    clean = "".join(character if character.isprintable() else "?" for character in line)
    with contextlib.suppress(OSError):
        os.write(2, f"{time.strftime('%Y-%m-%dT%H:%M:%S')} warmcell-helper {clean[:2000]}\n".encode())


def main(arguments: list[str]) -> None:
    """A helper that ends with who started it: `server.main([LISTENING_FD, LIFELINE_FD, BASE, FOR_ALL])`."""
    listening, lifeline, base = int(arguments[0]), int(arguments[1]), arguments[2]
    linux.name_process("warmcell-helper")
    linux.die_with_parent(signal.SIGTERM)
    os.umask(0o077)
    with socket.socket(fileno=listening) as opened:
        serve(opened, Helper(base, os.environ, only=None if arguments[3] == "1" else os.getuid()), lifeline=lifeline)
    sys.exit(0)
