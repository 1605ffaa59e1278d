"""Who asks, and whether they may: before any handler runs, and for all verbs in one place.

The user's own processes may do everything. Whoever acts for a principal, by its token or by naming it, has the verbs of
`VERBS` alone, and sandboxes and snapshots of others do not exist for them.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tornado.httputil import HTTPServerRequest

from warmcell.extension.keeper.open_requests import OpenRequests
from warmcell.extension.keeper.principals import NAME, SCOPES, Principal, Principals, bearer
from warmcell.extension.keeper.quotas import PrincipalQuotas
from warmcell.extension.keeper.tickets import HEADER as TICKET
from warmcell.extension.keeper.tickets import Tickets
from warmcell.sandbox.errors import InvalidRequestError, NotFoundError, SandboxNotFoundError, UnauthenticatedError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId, SandboxInfo, SnapshotId, SnapshotInfo
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.snapshots import lookup

PREFIX: Final = "/warmcell/api/v1"
HEADER: Final = "Warmcell-Principal"
"""Names the principal for whom a process of the user's own asks, with all scopes."""

TOKEN_HEADER: Final = "Warmcell-Token"  # noqa: S105 - the name of a header
"""The id of its token with which that ends."""

ANY: Final = "any"
"""The scope of what whoever has a token may ask: whose it is, which servers ask to see whether it is still valid."""

VERBS: Final[tuple[tuple[str, str, str], ...]] = (
    ("GET", r"/openapi\.json", "read"),
    ("GET", r"/principals/self", ANY),
    ("DELETE", r"/principals/self", "run"),
    ("GET", r"/(?:gpus|sandboxes|snapshots|events)", "read"),
    ("POST", r"/check", "read"),
    ("POST", r"/sandboxes", "run"),
    ("GET", r"/sandboxes/[a-z0-9]+", "read"),
    ("DELETE|PATCH", r"/sandboxes/[a-z0-9]+", "run"),
    ("POST", r"/sandboxes/[a-z0-9]+/(?:snapshot|restore|fork)", "snapshot"),
    ("GET|POST|PUT|PATCH|DELETE", r"/sandboxes/[a-z0-9]+/(?!snapshot$|restore$|fork$).+", "run"),
    ("GET", r"/snapshots/[^/]+", "read"),
    ("PATCH|DELETE", r"/snapshots/[^/]+", "snapshot"),
)
"""What principals have of the API, and the scope that each verb takes. What is below a sandbox is theirs as that is."""

ASKABLE: Final = ("gpu", "limits", "network", "template", "preload", "image", "env", "backend", "user")
"""The fields of a spec that a principal may choose."""


def narrow(
    principal: Principal,
    asked: Mapping[str, Any],
    *,
    usual: str = "auto",
    has_image: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """A principal's wish for a sandbox, refused where it is not for it to choose.

    Args:
        principal: Whose.
        asked: What is to be other than usual.
        usual: The backend of sandboxes that name none.
        has_image: Whether principals may ask for the image of that name.

    Raises:
        InvalidRequestError: It names something of the host, or would be isolated from nothing.
        ForbiddenError: Its token lacks a scope.
    """
    for name in asked:
        if name not in ASKABLE:
            raise InvalidRequestError(
                f"{name!r} cannot be chosen with a token", hint=f"Only {', '.join(ASKABLE)} can: nothing of the host."
            )
    if asked.get("gpu") is not None:
        principal.check("gpu", "ask for GPUs")
    image = asked.get("image")
    if isinstance(image, str) and image and not has_image(image):
        raise InvalidRequestError(
            f"The image {image!r} is not for principals",
            hint="Have the operator build it (`warmcell images build`), or name it in c.Warmcell.principal_images.",
        )
    if asked.get("network") == "host":
        raise InvalidRequestError(
            "Sandboxes of principals do not have the machine's network", hint='Name hosts: {"allow": ["pypi.org"]}.'
        )
    backend = asked.get("backend", "auto")
    if (usual if backend == "auto" else backend) == "process":
        raise InvalidRequestError(
            "The process backend isolates nothing, so it is not for principals",
            hint="Ask for bubblewrap, docker or gvisor; or have the operator set c.Warmcell.backend to auto.",
        )
    return dict(asked)


@dataclass(frozen=True, slots=True)
class Gate:
    """The keeper's application has it as its setting `gate`; sockets of sandboxes have none."""

    principals: Principals
    quotas: PrincipalQuotas
    service: SandboxService
    tickets: Tickets
    open: OpenRequests = field(default_factory=OpenRequests)

    def who(self, request: HTTPServerRequest) -> Principal | None:
        """Whoever asks; None for the user.

        Raises:
            UnauthenticatedError: A token or a ticket is shown, or a token named, that is not valid.
            ForbiddenError: A ticket is shown that was made for another request.
            InvalidRequestError: Somebody is named who cannot be.
        """
        headers = request.headers
        if TICKET in headers:
            return self._admitted(request)
        token, named = bearer(headers), headers.get(HEADER)
        if token is not None:
            return self.principals.find(token)
        if named is None:
            return None
        if not NAME.fullmatch(named) or named == "self":
            raise InvalidRequestError(f"{named!r} cannot be a principal", hint=f"Send {HEADER}: name.")
        token_id = headers.get(TOKEN_HEADER)
        if token_id is not None and not self.principals.holds(named, token_id):
            raise UnauthenticatedError(
                "The token that this was given out to is not valid any more", hint="Connect with another one."
            )
        return Principal(named, frozenset(SCOPES), token_id)

    def ends(self, request: HTTPServerRequest) -> bool:
        """Whether it can lose the right to go on: the user's own processes cannot."""
        return any(name in request.headers for name in (TICKET, HEADER)) or bearer(request.headers) is not None

    def may_go_on(self, request: HTTPServerRequest) -> None:
        """Raises UnauthenticatedError once what opened a request has ended, of which it may be in the middle.

        A file that is on its way by a URL may come to its end when the URL's time is over, though not its token's.
        """
        if TICKET not in request.headers:
            self.who(request)
            return
        self.tickets.read(request.headers[TICKET], over=below(request.path, "sandboxes/[a-z0-9]+") == "files")

    def _admitted(self, request: HTTPServerRequest) -> Principal | None:
        """For whom a ticket was made, which is good for this request alone."""
        ticket = self.tickets.read(request.headers[TICKET])
        query = {
            name: [value.decode(errors="surrogateescape") for value in values]
            for name, values in request.query_arguments.items()
        }
        ticket.check(str(request.method), request.path.removeprefix(PREFIX), query)
        if ticket.principal is None:
            return None
        return Principal(ticket.principal, frozenset({"run"}), ticket.token_id)

    def check(self, principal: Principal, method: str, path: str) -> None:
        """Whether that verb is for principals, and this one's token is for it.

        Raises:
            NotFoundError: Principals have no such verb.
            ForbiddenError: Its token lacks the scope.
        """
        path = path.removeprefix(PREFIX)
        for methods, pattern, scope in VERBS:
            if method in methods.split("|") and re.fullmatch(pattern, path):
                if scope != ANY:
                    principal.check(scope, SCOPES[scope])
                return
        raise NotFoundError(f"{method} {path} is not there for tokens", hint="See the reference of the REST API.")

    def sandbox(self, principal: Principal, sandbox_id: str) -> SandboxInfo:
        """One of its sandboxes.

        Raises:
            SandboxNotFoundError: It has none of that id, whoever else may have it.
            QuotaExceededError: It would wake one with GPUs, and has had all that it may have of them.
        """
        try:
            info = self.service.info(SandboxId(sandbox_id))
        except SandboxNotFoundError:
            info = None
        if info is None or info.principal != principal.name:
            raise SandboxNotFoundError(f"There is no sandbox {sandbox_id}", hint="List your own with GET /sandboxes.")
        return info

    def check_awake(self, principal: Principal, info: SandboxInfo, *, uses: bool = False) -> None:
        """Raises QuotaExceededError if this would lease GPUs again, of which its principal has had all.

        Args:
            principal: Whose it is.
            info: The sandbox.
            uses: Whether something is to be done there. One that is parked takes no GPU to be looked at.
        """
        asleep = info.state is State.SUSPENDED or (uses and info.parked is not None)
        if asleep and info.gpu is not None:
            self.quotas.check_gpus(principal.name)

    def check_copy(self, principal: Principal, gpu: object) -> None:
        """Raises ForbiddenError if a copy of what has such GPUs leases more, and its token is not for that."""
        if gpu is not None:
            principal.check("gpu", "ask for GPUs")

    def snapshot(self, principal: Principal, ref: str, sandbox_id: str | None = None) -> SnapshotId:
        """The id of one of its snapshots, by id or name.

        Raises:
            SnapshotNotFoundError: It has none like that.
            ConflictError: Several of its sandboxes have one of this name.
        """
        infos = [info for info in self.service.memory.store.infos() if info.principal == principal.name]
        return lookup.find(infos, ref, sandbox_id=SandboxId(sandbox_id) if sandbox_id else None)


def own_sandboxes(principal: Principal | None, infos: Iterable[SandboxInfo]) -> Sequence[SandboxInfo]:
    """Those that exist for whoever asks."""
    return [info for info in infos if principal is None or info.principal == principal.name]


def own_snapshots(principal: Principal | None, infos: Iterable[SnapshotInfo]) -> Sequence[SnapshotInfo]:
    """Those that exist for whoever asks."""
    return [info for info in infos if principal is None or info.principal == principal.name]


def below(path: str, noun: str) -> str | None:
    """What comes after a noun in a path: `below("…/sandboxes/x1/run", "sandboxes")` is "x1"."""
    match = re.match(rf"{PREFIX}/{noun}/([^/]+)", path)
    return None if match is None else match[1]
