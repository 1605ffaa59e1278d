"""What all handlers of the keeper's REST share: the keeper, whose request it is, and fields of bodies."""

import contextlib
import math
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from warmcell.extension.keeper.gate import Gate, narrow
from warmcell.extension.keeper.http import JsonHandler
from warmcell.extension.keeper.principals import Principal
from warmcell.extension.keeper.scope import GuestScope
from warmcell.sandbox.errors import ImageNotFoundError, InvalidRequestError
from warmcell.sandbox.models import SandboxId, SandboxInfo

if TYPE_CHECKING:
    from warmcell.extension.keeper.api import KeeperApi


class Handler(JsonHandler):
    """Access to the keeper, and to the scope of whoever asks."""

    @property
    def keeper(self) -> "KeeperApi":
        keeper: KeeperApi = self.settings["keeper"]
        return keeper

    @property
    def scope(self) -> GuestScope | None:
        scope: GuestScope | None = self.settings["scope"]
        return scope

    def own_snapshot(self, ref: str, sandbox_id: str | None = None) -> str:
        """What to ask the store for: of a principal, the id of one of its own.

        Raises:
            SnapshotNotFoundError: It has none like that.
        """
        if self.principal is None:
            return ref
        gate: Gate = self.settings["gate"]
        return gate.snapshot(self.principal, ref, sandbox_id)

    def narrowed(self, principal: Principal, asked: dict[str, Any]) -> dict[str, Any]:
        """A principal's wish, within the operator's settings; raises as `narrow`."""
        usual = self.keeper.wiring.settings.usual_backend
        return narrow(principal, asked, usual=usual, has_image=self.has_image)

    def has_image(self, name: str) -> bool:
        """Whether who is not the user may ask for it: it was built here, or the operator names it."""
        settings = self.keeper.wiring.settings
        named = [*settings.principal_images, *([settings.docker_image] if settings.docker_image else [])]
        with contextlib.suppress(ImageNotFoundError):
            return bool(self.keeper.images.info(name))
        return any(fnmatchcase(name, one) for one in named)

    def visible(self, sandbox_id: str) -> SandboxInfo:
        """The sandbox, if it exists for whoever asks."""
        info = self.keeper.service.info(SandboxId(sandbox_id))
        if self.scope is not None:
            self.scope.check_visible(info)
        return info


def object_of(body: dict[str, Any], name: str) -> dict[str, Any]:
    """A field that is an object; empty where it is left out. Raises InvalidRequestError."""
    value = body.get(name, {})
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{name} must be an object", hint=f'Send {{"{name}": {{…}}}}.')
    return value


def parsed(said: str) -> float | str:
    """What a query says, as a number where it is one."""
    try:
        return float(said)
    except ValueError:
        return said


def number(value: Any, name: str, *, least: float = 0.0, most: float) -> float:
    """A field that is a number within these bounds; raises InvalidRequestError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequestError(f"{name} must be a number, not {value!r}", hint=f"Give {name}.")
    if not least <= value <= most:
        raise InvalidRequestError(f"{name} is {value:g}", hint=f"Give a number from {least:g} to {most:g}.")
    return float(value)


def text(value: Any, name: str) -> str:
    """A field that is text, and not empty; raises InvalidRequestError."""
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"{name} must be text, not {value!r}", hint=f"Give {name}.")
    return value
