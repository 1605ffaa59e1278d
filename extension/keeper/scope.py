"""What code inside a sandbox may ask of the keeper: no more than its own sandbox was given."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from warmcell.sandbox.errors import InvalidRequestError, SandboxNotFoundError
from warmcell.sandbox.models import GIB, Limits, NetworkPolicy, SandboxId, SandboxInfo, SandboxSpec

ASKABLE = ("gpu", "image", "preload", "template", "limits", "network")
"""The fields of a spec that code in a sandbox may choose; everything else is its own sandbox's."""


@dataclass(frozen=True)
class GuestScope:
    """One sandbox's view: it sees only what it created, and creates only its like."""

    sandbox_id: SandboxId
    spec: SandboxSpec

    def visible(self, infos: Sequence[SandboxInfo]) -> list[SandboxInfo]:
        """Those that were made from here."""
        return [info for info in infos if info.parent == self.sandbox_id]

    def check_visible(self, info: SandboxInfo) -> None:
        """Raises SandboxNotFoundError for what was not made from here, as if it did not exist."""
        if not self.visible([info]):
            raise SandboxNotFoundError(
                f"There is no sandbox {info.id}", hint="Only sandboxes made from this one are seen here."
            )

    def narrow(
        self,
        asked: Mapping[str, Any],
        *,
        values_bytes: int = 0,
        egress: NetworkPolicy | None = None,
        has_image: Callable[[str], bool] = lambda name: False,
    ) -> SandboxSpec:
        """The spec of a sandbox made from here.

        Args:
            asked: What it is to be, as far as that can be chosen.
            values_bytes: So much shared memory it may have even where this one has less, for what is sent to it.
            egress: What this one reaches now; the other reaches the same, or nothing if that is asked for.
            has_image: Whether code in a sandbox may ask for the image of that name; for its own one it always may.

        Raises:
            InvalidRequestError: It asks for more than this sandbox has.
        """
        for name in asked:
            if name not in ASKABLE:
                raise InvalidRequestError(
                    f"{name!r} cannot be chosen from inside a sandbox", hint=f"Only {', '.join(ASKABLE)} can."
                )
        if not isinstance(asked.get("network", ""), str):
            raise InvalidRequestError(
                "Code in a sandbox cannot choose what is reached", hint="What it makes reaches what it reaches itself."
            )
        wanted = SandboxSpec.from_json({"python": self.spec.python, **asked})
        if wanted.network != "none" and self.spec.network == "none":
            raise InvalidRequestError(
                "This sandbox has no network, so neither have those it makes",
                hint="Choose a network for this notebook in the Warmcell menu, and restart.",
            )
        if wanted.image not in ("", None, self.spec.image) and not has_image(wanted.image):
            raise InvalidRequestError(
                f"Code in a sandbox cannot ask for the image {wanted.image!r}: it was not built here",
                hint="Build it (docs/howto/images.md), or have the operator name it in c.Warmcell.principal_images.",
            )
        _check_memory(self.spec.limits, wanted.limits)
        return dataclasses.replace(
            self.spec,
            gpu=wanted.gpu,
            network=wanted.network if "network" in asked else self.spec.network,
            egress=None if "network" in asked else egress,
            limits=dataclasses.replace(
                _least(self.spec.limits, wanted.limits),
                shm_bytes=min(wanted.limits.shm_bytes, max(self.spec.limits.shm_bytes, values_bytes)),
            ),
            image=wanted.image if "image" in asked else self.spec.image,
            python="" if asked.get("image") else self.spec.python,
            preload=wanted.preload if "preload" in asked else self.spec.preload,
            template=wanted.template if "template" in asked else self.spec.template,
        )


def of_gpu(gpu: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a GPU is held, but not by whom."""
    lease = gpu.get("lease")
    seen = {**gpu, "lease": None if lease is None else {"since": lease.get("since")}}
    seen.pop("leases", None)
    return seen


def _check_memory(own: Limits, asked: Limits) -> None:
    if own.memory_bytes is not None and asked.memory_bytes is not None and asked.memory_bytes > own.memory_bytes:
        raise InvalidRequestError(
            f"{asked.memory_bytes / GIB:.1f} GiB of memory are asked for, all ranks together, and the notebook itself "
            f"has a cap of {own.memory_bytes / GIB:.1f} GiB",
            hint="Ask for less with memory=, for fewer ranks, or give the notebook more in the Warmcell menu.",
        )


def _least(own: Limits, asked: Limits) -> Limits:
    """Field by field the smaller cap; None is no cap."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Limits):
        caps = [cap for cap in (getattr(own, field.name), getattr(asked, field.name)) if cap is not None]
        values[field.name] = min(caps) if caps else None
    return Limits(**values)
