"""What the helper does when it is asked: one method for each operation, run in the process of that request."""

from __future__ import annotations

import contextlib
import os

from warmcell.sandbox.helper import (
    carrying,
    clones,
    compacting,
    dump,
    packing,
    places,
    populate,
    probe,
    program,
    restore,
)
from warmcell.sandbox.helper.busy import Busy
from warmcell.sandbox.helper.enter import Cancelled
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.shelf import ID, Shelf, full

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from warmcell.sandbox.helper.maker import Maker
    from warmcell.sandbox.helper.places import Place
    from warmcell.sandbox.helper.shelf import Draft
    from warmcell.sandbox.helper.wire import Conversation

VERSION = "1"
"""Of the protocol."""
THAW_TIMEOUT_S = 600.0
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
        kind: str = "",
    ) -> None:
        """Configure it.

        Args:
            base: Directory of all images.
            environment: Where WARMCELL_CRIU and PATH are looked up.
            only: The one uid that it serves, besides root; everybody if None.
            maker: What makes sandboxes for ordinary users, if it does.
            kind: What it is, where it is neither the machine's nor a child of root's keeper.
        """
        self.base = base
        self.only = only
        self.maker = maker
        self._kind = kind
        self.busy = Busy()
        self._environment = environment
        self._program: program.Program | None = None
        self._operations: Mapping[str, Callable[[Conversation], None]] = {
            "hello": self._hello,
            "enroll": self._enroll,
            "dump": self._dump,
            "restore": self._restore,
            "populate": self._populate,
            "compress": self._compress,
            "settle": self._settle,
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
            self._program = program.find(self._environment, owners=(0, self.only or 0))
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
            with contextlib.suppress(OSError, HelperError):  # What one user has must not be in the way of the next.
                shelf = Shelf(self.base, int(name))
                shelf.clean()
                shelf.finish()

    def rest(self, *, ending: bool = False) -> None:
        """Let go of what was kept for requests that have not come; all of it at the end, or where the disk is full."""
        for name in filter(str.isdigit, os.listdir(self.base) if os.path.isdir(self.base) else []):
            with contextlib.suppress(OSError, HelperError):
                spare = Shelf(self.base, int(name)).pages.spare
                if ending:
                    spare.discard()
                else:
                    spare.expire()

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
                "by": self._kind,
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

        def saved(draft: Draft, told: Mapping[str, Any]) -> None:
            conversation.say({"ok": True, "image_bytes": draft.own_bytes(), **told})

        shelf = self._shelf(conversation)
        draft = dump.dump(
            self.program(),
            shelf,
            place,
            image=conversation.text("image"),
            guest_pid=conversation.number("pid"),
            then=then,
            nothing=probe.nothing(self.base),
            cache=probe.cache(self.program(), self.base),
            frozen=frozen,
            saved=saved,
            stopped=stopped if conversation.request.get("early") is True else None,
            reader=(conversation.uid, conversation.gid),
        )
        conversation.close()
        if conversation.request.get("passing") is True:  # It is gone before anybody could need a checksum of it.
            draft.close(keep=True)
            return
        # The image can be used already; the rest takes time and nobody waits for it.
        os.nice(BACKGROUND_NICE)
        with contextlib.suppress(FileNotFoundError):
            draft.finish()
        draft.close(keep=True)
        compacting.attend(shelf, draft.image)
        shelf.pages.collect()

    def _restore(self, conversation: Conversation) -> None:
        image = conversation.text("image")
        nothing, cache = probe.nothing(self.base), probe.cache(self.program(), self.base)
        source = restore.Source(self.program(), self._shelf(conversation), image, nothing=nothing, cache=cache)
        conversation.in_parts = True
        clones.serve(conversation, source, self._place, base=self.base)

    def _compress(self, conversation: Conversation) -> None:
        os.nice(BACKGROUND_NICE)

        def told(done: int, of: int) -> None:
            if conversation.gone():
                raise Cancelled
            conversation.say({"ok": True, "done": done, "of": of})

        packing.pack(self._shelf(conversation), conversation.text("image"), told=told)
        conversation.say({"ok": True})

    def _populate(self, conversation: Conversation) -> None:
        parts = populate.needed(self._shelf(conversation), conversation.text("image"))
        conversation.say({"ok": True, "bytes": sum(length for _, _, length in parts)})
        conversation.close()
        os.nice(BACKGROUND_NICE)
        populate.read(parts)

    def _settle(self, conversation: Conversation) -> None:
        os.nice(BACKGROUND_NICE)
        self._shelf(conversation).settle(conversation.text("image"))
        conversation.say({"ok": True})

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
        os.nice(BACKGROUND_NICE)
        conversation.say({"ok": True, **carrying.verify(self._shelf(conversation), image=conversation.text("image"))})
