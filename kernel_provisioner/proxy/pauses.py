"""A kernel that is left alone for a while and goes on, here or elsewhere, now or as it was earlier."""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from warmcell.kernel_provisioner.proxy.activity import QUIET, Asked
from warmcell.kernel_provisioner.proxy.link import Answer, GuestLink, Word
from warmcell.kernel_provisioner.proxy.requests import RequestChannel
from warmcell.kernel_provisioner.proxy.traffic import Traffic
from warmcell.kernel_provisioner.proxy.wire import Message
from warmcell.sandbox.errors import ConflictError, WarmcellError

_HANG_UP_S: Final = 0.25
_DRAIN_S: Final = 0.25
_SILENCE_S: Final = 0.1


class Pauses:
    """Commands of the relay's thread; none of them waits for a kernel longer than a quarter of a second."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    # Leaving.

    def ask_leave(self, token: str, offload: str = "") -> tuple[Answer, Answer, Answer]:
        """Hold back requests and ask the kernel to be left; its comms, its leave, and when all was heard before that.

        Args:
            token: What it is to show when it was restored.
            offload: Of which kind of device torch is to move what it has there; empty: nothing is moved.

        Raises:
            ConflictError: No kernel is connected that answers.
        """
        guest = self._traffic.guest
        if guest is None or not guest.live or guest.held:
            raise ConflictError(
                "No kernel is connected that could be paused", hint="Start it, or wait until it is ready."
            )
        guest.held = True
        if guest.info is None and self._traffic.stand_in.info is None:
            guest.ask("kernel_info_request", {}).add_done_callback(self._remember_info)
        comms = guest.ask("comm_info_request", {})
        content = {"token": token, "offload": offload} if offload else {"token": token}
        leave = guest.ask("warmcell_before_snapshot_request", content, mark=True)
        return comms, leave, guest.marked

    def stay(self) -> None:
        """Go on as before; the kernel lets go of what it has kept."""
        guest = self._traffic.guest
        if guest is not None and guest.held:
            guest.held = False
            guest.send_own("control", "warmcell_go_on_request", {})

    def _remember_info(self, answer: Answer) -> None:
        if answer.exception() is None:
            self._traffic.stand_in.info = answer.result()

    def silent(self) -> bool:
        """Whether everything was sent and nothing has come for a while, though it was listened to."""
        guest = self._traffic.guest
        if guest is None:
            return True
        quiet = time.monotonic() - guest.heard_at >= _SILENCE_S
        return quiet and not guest.unsent_bytes and not self._traffic.clients.full()

    def leave(self, comms: Answer) -> tuple[str, ...]:
        """Close the guest side completely, when the kernel has closed its own; what it was asked stays open.

        Returns:
            The msg_ids of what it is in the middle of, or has not begun.
        """
        guest = self._traffic.guest
        if guest is None or not guest.held:
            raise ConflictError("The kernel went away while it was paused", hint="Start or restart the kernel.")
        stand_in = self._traffic.stand_in
        stand_in.info = guest.info or stand_in.info
        if comms.done() and comms.exception() is None and isinstance(found := comms.result().get("comms"), dict):
            stand_in.comms = found
        self._hang_up(guest)
        return self._traffic.activity.in_kernel()

    def _hang_up(self, guest: GuestLink) -> None:
        traffic = self._traffic
        guest.hang_up()
        # Its sockets have gone only when it has seen the end of ours; what was on its way until then is taken along.
        traffic.read_guest(guest, deadline=time.monotonic() + _HANG_UP_S, until_closed=True)
        guest.close(traffic.waiter)
        traffic.guest = None
        traffic.paused = True

    # Coming back.

    def come_back(self, prefix: str, word: Word, *, undone: bool, inherited: Collection[str]) -> Answer:
        """Connect to a kernel that goes on; a future of its answer to the word."""
        traffic = self._traffic
        if traffic.guest is not None:
            raise ConflictError("A kernel is connected", hint="Pause it first.")
        traffic.paused = True
        strange = {name for name in inherited if not traffic.activity.knows(name)}
        traffic.activity.inherited(strange)
        self._withdraw(set(inherited) - strange)
        traffic.unwanted.clear()
        if undone:
            traffic.unwanted.add(strange)
        guest = traffic.link(prefix, fresh=False, word=word)
        guest.held = True
        traffic.guest = guest
        traffic.crossings.add(traffic.activity.unanswered(), last_input=traffic.last_input)
        guest.care()
        return guest.wait_ready()

    def _withdraw(self, names: Collection[str]) -> None:
        """These need not be put to the kernel again: it has them itself."""
        traffic = self._traffic
        for name in traffic.requests.names().intersection(names):
            traffic.activity.sent(name)
        traffic.requests.sift(lambda _channel, name, _message: name not in names)

    def let_in(self) -> None:
        """Let requests through to the kernel that has come back."""
        guest = self._traffic.guest
        if guest is None or not guest.live:
            raise ConflictError("The kernel went away", hint="Start or restart the kernel.")
        guest.held = False
        self._traffic.paused = False
        self._traffic.activity.went_on()
        self._traffic.stand_in.end()

    def give_up(self) -> None:
        """Close the guest side again; requests go on waiting."""
        traffic = self._traffic
        if traffic.guest is not None:
            traffic.guest.close(traffic.waiter)
            traffic.guest = None

    # Suspended.

    def suspended(
        self,
        *,
        info: Mapping[str, Any] | None,
        known_as: bytes,
        on_wake: Callable[[], None],
        on_shutdown: Callable[[bool], None] | None,
        on_look: Callable[[], None] | None = None,
        on_interrupt: Callable[[], None] | None = None,
    ) -> None:
        """Answer for the kernel from now on; what waits already is answered, or wakes it."""
        traffic = self._traffic
        if traffic.guest is not None:
            raise ConflictError("A kernel is connected", hint="Pause it first.")
        traffic.paused = True
        stand_in = traffic.stand_in
        if info:
            stand_in.info = dict(info)
        traffic.identity = known_as or traffic.identity
        stand_in.begin(on_wake=on_wake, on_shutdown=on_shutdown, on_look=on_look, on_interrupt=on_interrupt)
        traffic.answer_waiting(stand_in.answers)
        if traffic.waits_for_kernel():
            stand_in.wake()

    def refuse(self, error: WarmcellError) -> None:
        """Answer what waits with an error; what comes next may wake the kernel again."""
        traffic = self._traffic

        def answers(channel: RequestChannel, kind: str, request: Message) -> bool:
            said = {"ename": type(error).__name__, "evalue": str(error), "traceback": [str(error)]}
            content = {"status": "error", **said}
            if kind == "execute_request":
                traffic.publish(traffic.author.answer("error", said, request, to_asker=False))
            if kind.endswith("_request"):
                traffic.answer(channel, kind.removesuffix("_request") + "_reply", content, request)
            traffic.say_status("idle", request)
            return True

        traffic.answer_waiting(answers)
        traffic.stand_in.may_wake = True

    def awake(self) -> None:
        """Answer for the kernel no more; requests wait."""
        self._traffic.stand_in.end()

    # Undo.

    def end_open_requests(self, asked_by: str) -> None:
        """Give up the kernel's present state for an earlier one, and answer in its place what it was asked."""
        traffic = self._traffic
        guest = traffic.guest
        if guest is not None:
            guest.held = True
            guest.mark()
            traffic.read_guest(guest, deadline=time.monotonic() + _DRAIN_S)
            guest.close(traffic.waiter)
            traffic.guest = None
        traffic.paused = True
        traffic.crossings.clear()
        traffic.requests.sift(lambda channel, _name, _message: channel != "stdin")
        count = self._count(asked_by)
        found = traffic.activity.give_up()
        again: list[tuple[str, Asked, Message]] = []
        before = any(name == asked_by for name, _ in found)
        for name, asked in found:
            request, ok = asked.message, name == asked_by
            before = before and not ok
            if request is None:
                continue
            if not ok and asked.whole and (asked.kind in QUIET or not (before or asked.begun)):
                again.append((name, asked, request))
                continue
            if asked.kind.endswith("_request") and not asked.answered:
                done = {"status": "ok", "execution_count": count, "user_expressions": {}, "payload": []}
                content = done if ok else {"status": "aborted"}
                traffic.answer(asked.channel, asked.kind.removesuffix("_request") + "_reply", content, request)
            traffic.say_status("idle", request)
        for name, asked, request in reversed(again):
            traffic.requests.put_back(asked.channel, name, request)
            traffic.activity.asked_again(name, asked)

    def _count(self, asked_by: str) -> int:
        """The number of the cell with this msg_id, or of the last one that ran."""
        said = self._traffic.last_input
        count = said.read_content().get("execution_count") if said is not None else None
        return count if isinstance(count, int) else 0
