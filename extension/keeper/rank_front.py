"""How kernels of `%%remote` are left while they are parked: they stay connected, the keeper is their only client."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from warmcell.extension.keeper.rank_client import RankClient
from warmcell.extension.keeper.ranks import Rank, share
from warmcell.sandbox import errors
from warmcell.sandbox.gpus.environment import environment
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.live import LiveSandbox

TELL_TIMEOUT_S = 60.0


class RankFront:
    """Implements `Frontend` for a sandbox that is parked, and only for that."""

    def __init__(self, box: LiveSandbox, ranks: Callable[[], Iterable[tuple[Rank, RankClient]]]) -> None:
        """`ranks` are those whose kernels run."""
        self._box = box
        self._ranks = ranks
        self._had = box.gpus

    def record(self) -> Mapping[str, Any]:
        """Nothing: it ends with its keeper."""
        return {}

    async def pause(self, *, token: str, offload: str = "") -> int:
        """No cell runs there, so there is nothing to hold."""
        if offload:
            raise errors.UnsupportedOperationError(
                "What remote kernels have on GPUs is moved by the driver alone", hint="`%remote close` gives them back."
            )
        self._had = self._box.gpus
        return 0

    async def go_on(
        self,
        kernel: KernelProcess,
        record: Mapping[str, Any],
        *,
        token: str,
        restored: bool,
        clone: bool,
        undone: bool = False,
    ) -> None:
        """Tell each rank's kernel which GPUs it has now, where they are others."""
        for rank, client in self._ranks():
            before, now = environment(share(self._had, rank)), environment(share(self._box.gpus, rank))
            env = {name: now.get(name) for name in {**before, **now} if before.get(name) != now.get(name)}
            if env:
                await client.ask("warmcell_go_on_request", {"env": env}, timeout_s=TELL_TIMEOUT_S)
        self._had = self._box.gpus

    async def undone(self) -> None:
        """It is not put back to what it was."""

    async def sleep(self, record: Mapping[str, Any]) -> None:
        """The next cell notices."""
