"""What code in a sandbox may do with its own memory, on its `api.sock`: snapshot, restore, fork, a clone's result.

Each is acknowledged at once and done afterwards: a kernel cannot be saved as long as it is connected to anybody.
"""

import re
from typing import Any

from warmcell.extension.keeper.http import JsonHandler
from warmcell.extension.keeper.kernel_memory import CLONES_MAX, KernelMemory
from warmcell.extension.keeper.scope import GuestScope
from warmcell.extension.keeper.wishes import Wishes
from warmcell.sandbox import errors
from warmcell.sandbox.lifecycle import TERMINAL
from warmcell.sandbox.models import SandboxId
from warmcell.sandbox.snapshots import lookup

TOKEN = re.compile(r"[0-9a-f]{16}")


def routes() -> list[tuple[str, type[JsonHandler]]]:
    """Paths below the API's prefix, for code in a sandbox only."""
    return [
        (r"/snapshots", OwnSnapshotsHandler),
        (r"/sandboxes/self/(snapshot|restore|fork|gpu)", WishHandler),
        (r"/sandboxes/([a-z0-9]+)/result", ResultHandler),
    ]


def routes_for_ranks() -> list[tuple[str, type[JsonHandler]]]:
    """The same paths for ranks of remote cells, whose memory is saved by nobody."""
    return [(path, RankHandler) for path, _ in routes()]


class RankHandler(JsonHandler):
    """Says so."""

    def prepare(self) -> None:
        raise errors.UnsupportedOperationError(
            "A rank of a remote cell has no snapshots or forks of its own",
            hint="Save or fork the notebook's kernel: %snapshot, warmcell.fork(), %%remote fork.",
        )


class _Handler(JsonHandler):
    @property
    def memory(self) -> KernelMemory:
        memory: KernelMemory = self.settings["keeper"].memory
        return memory

    @property
    def wishes(self) -> Wishes:
        wishes: Wishes = self.settings["keeper"].wishes
        return wishes

    @property
    def scope(self) -> GuestScope:
        scope: GuestScope = self.settings["scope"]
        return scope


class OwnSnapshotsHandler(_Handler):
    """The snapshots that this sandbox may be restored from."""

    def get(self) -> None:
        infos = self.wishes.snapshots_of(self.scope.sandbox_id)
        self.answer({"snapshots": [info.to_json() for info in infos]})


class WishHandler(_Handler):
    """Acknowledge what is to be done, where it can be done at all."""

    async def post(self, verb: str) -> None:
        body, sandbox_id = self.body(), self.scope.sandbox_id
        if verb == "gpu":
            self.wishes.change_gpu_from_inside(sandbox_id, _token(body.get("token")), gpu_wish(body.get("gpu")))
            self.answer({}, 202)
            return
        await self.memory.check(sandbox_id)
        if verb == "fork":
            token, count, ranks = _token(body.get("token")), _count(body.get("n")), body.get("ranks") is True
            self.wishes.fork_from_inside(sandbox_id, token, count, ranks=ranks)
        elif verb == "snapshot":
            self.wishes.snapshot_from_inside(sandbox_id, _token(body.get("token")), _name(body.get("name")))
        else:
            self.wishes.restore_from_inside(sandbox_id, _name(body.get("name")), asked_by=_cell(body.get("cell")))
        self.answer({}, 202)


class ResultHandler(_Handler):
    """What a clone has handed over: 204 while there is nothing yet."""

    async def get(self, sandbox_id: str) -> None:
        service = self.settings["keeper"].service
        info = service.info(SandboxId(sandbox_id))
        self.scope.check_visible(info)
        told = None if info.state in TERMINAL else await self.wishes.result(info.id)
        if told is not None:
            self.set_header("Content-Type", "application/octet-stream")
            self.finish(told)
            return
        if info.state in TERMINAL or not self.wishes.has_kernel(info.id):
            raise errors.SandboxDiedError(f"Clone {sandbox_id} ended without a result", hint="Fork again.")
        self.set_status(204)
        self.finish()


def _token(value: Any) -> str:
    if not isinstance(value, str) or not TOKEN.fullmatch(value):
        raise errors.InvalidRequestError("token must be sixteen hexadecimal digits", hint="Call warmcell.fork().")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= CLONES_MAX:
        raise errors.InvalidRequestError(f"{value!r} clones", hint=f"Ask for 1 to {CLONES_MAX}.")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise errors.InvalidRequestError("name must be text", hint="Give the snapshot's name.")
    lookup.check_name(value)
    return value


def gpu_wish(value: Any) -> str | tuple[str, ...] | None:
    """A GPU request as it is in JSON; None: no GPU.

    Raises:
        InvalidRequestError: It is none.
    """
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return tuple(value)
    raise errors.InvalidRequestError("gpu must be a request or null", hint='Ask as in "A100", or for null: no GPU.')


def _cell(value: Any) -> str:
    if not isinstance(value, str):
        raise errors.InvalidRequestError("cell must be the msg_id of the request", hint="Use %restore NAME.")
    return value
