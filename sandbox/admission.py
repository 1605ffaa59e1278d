"""Whether somebody may have a sandbox as it is asked for, and what makes it: all that is checked beforehand."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from warmcell.sandbox import errors
from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.choosing import AGENT, Choice, Choosing, chosen
from warmcell.sandbox.gpus.base import GpuLeases
from warmcell.sandbox.models import USUAL_UMASK, SandboxSpec
from warmcell.sandbox.network.egress import Egress


class Quotas(Protocol):
    """What principals may have; `extension.keeper.quotas` has the real one."""

    def check(self, principal: str, spec: SandboxSpec, *, count: int = 1) -> None: ...


class Admission:
    """The operator's bounds, the backends that are wired, and what each principal may have."""

    def __init__(
        self,
        backends: Mapping[str, SandboxBackend],
        *,
        default_backend: str,
        bounds: Bounds,
        egress: Egress,
        gpus: GpuLeases,
    ) -> None:
        """Begin without quotas.

        Args:
            backends: All that are wired, by name.
            default_backend: What the operator says of specs that name none.
            bounds: What every sandbox is held to.
            egress: What sandboxes without a network may reach.
            gpus: Whether a request for GPUs can ever be met.
        """
        self.backends = backends
        self.bounds = bounds
        self.choosing = Choosing(backends, configured=default_backend, among=bounds.backends)
        self.quotas: Quotas | None = None
        """Asked before a principal gets one more sandbox."""
        self._egress = egress
        self._gpus = gpus

    async def check(self, spec: SandboxSpec, owner: str, principal: str | None) -> tuple[SandboxSpec, Choice]:
        """The spec as it would be made for somebody, its backend named, and why that one; makes nothing.

        Its image stays if the spec is known to be in use before anything else is waited for; see `Images.resolve`.

        Raises:
            WarmcellError: It may not be made, or cannot be here.
        """
        if spec.umask is None:
            ours = owner != AGENT and principal is None
            spec = dataclasses.replace(spec, umask=self.bounds.umask if ours else USUAL_UMASK)
        spec = self.within_bounds(spec, principal)
        choice = await self.choosing.for_owner(spec, owner)
        spec = chosen(spec, choice)
        backend = self.backend(spec)
        if spec.gpu is not None:
            await self._gpus.check(spec.gpu, owner=owner)
        if spec.image is not None and self.choosing.images is not None:
            spec = await self.choosing.images.resolve(spec, backend.name)
        return spec, choice  # At once: until whoever asked has noted that spec, its image counts as unused.

    def within_bounds(self, spec: SandboxSpec, principal: str | None) -> SandboxSpec:
        """The spec, what it may reach in the form in which it is held to it.

        Raises:
            WarmcellError: It is more than the operator allows.
        """
        return self.reaching(self.bounds.check(spec), principal)

    def reaching(self, spec: SandboxSpec, principal: str | None) -> SandboxSpec:
        """Likewise, of what it may reach alone."""
        if spec.egress is None:
            return spec
        if spec.network != "none":
            raise errors.InvalidRequestError(
                "A sandbox with a network cannot be held to a list of hosts", hint='Leave network out, or give "none".'
            )
        return dataclasses.replace(spec, egress=self._egress.check(spec.egress, principal=principal))

    def backend(self, spec: SandboxSpec) -> SandboxBackend:
        """What makes a sandbox of that spec.

        Raises:
            InvalidRequestError: There is no such backend.
            UnsupportedOperationError: It cannot make one like that.
        """
        name = self.choosing.for_notebook(spec).backend
        backend = self.backends.get(name)
        if backend is None:
            raise errors.InvalidRequestError(
                f"There is no backend {name!r} here", hint=f"Use one of {', '.join(sorted(self.backends))}."
            )
        if spec.network not in backend.capabilities.networks:
            raise errors.UnsupportedOperationError(
                f"The {name} backend has no network {spec.network!r}",
                hint=f"Ask for {' or '.join(backend.capabilities.networks)} in the kernelspec or the Warmcell menu.",
            )
        if spec.gpu is not None and not backend.capabilities.gpus:
            able = [
                other for other, one in self.backends.items() if one.capabilities.gpus and one.capabilities.isolated
            ]
            raise errors.UnsupportedOperationError(
                f"The {name} backend has no GPUs", hint=f"Use {' or '.join(able)}, or do without."
            )
        return backend

    def check_quota(self, spec: SandboxSpec, principal: str | None, *, count: int = 1) -> None:
        """Raise if that principal may not have so many more; nobody's are not counted.

        Raises:
            WarmcellError: It may not, with what it has.
        """
        if principal is not None and self.quotas is not None:
            self.quotas.check(principal, spec, count=count)

    def check_room(self, live: int) -> None:
        """Raise if there are as many sandboxes as there may be.

        Raises:
            CapacityError: There are.
        """
        if live >= self.bounds.max_sandboxes:
            raise errors.CapacityError(
                f"There are {live} sandboxes already", hint="Stop one, or raise c.Warmcell.max_sandboxes."
            )
