"""What a kernel of an earlier time says about requests that nobody awaits any more."""

from collections.abc import Collection

from warmcell.kernel_provisioner.proxy.link import GuestChannelName
from warmcell.kernel_provisioner.proxy.wire import Message


class Unwanted:
    """Requests whose output and replies are dropped, until both the reply and the idle of each have come."""

    def __init__(self) -> None:
        self._ends: dict[str, set[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._ends)

    def add(self, names: Collection[str]) -> None:
        """Drop what is said about these from now on."""
        self._ends.update({name: set() for name in names})

    def clear(self) -> None:
        """Another kernel."""
        self._ends.clear()

    def includes(self, channel: GuestChannelName, message: Message) -> bool:
        """Whether this message is to be dropped."""
        parent = message.read_parent()[1]
        ends = self._ends.get(parent)
        if ends is None:
            return False
        if channel in ("shell", "control"):
            ends.add("reply")
        elif (
            channel == "iopub"
            and message.mentions("status")
            and message.read_content().get("execution_state") == "idle"
        ):
            ends.add("idle")
        if len(ends) == 2:
            del self._ends[parent]
        return True
