"""Every request of E2B's wire: which surface it is for, who asks, and how errors are told there."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, cast

from jupyter_server.auth.decorator import allow_unauthenticated
from tornado import web
from tornado.iostream import StreamClosedError

from warmcell.extension.keeper.principals import TOKEN_PREFIX, token_id
from warmcell.extension.pace import PATIENCE_S
from warmcell.extension.server.base import AUTH_RESOURCE
from warmcell.extension.server.e2b import failures, ports
from warmcell.extension.server.e2b.body import Body
from warmcell.extension.server.e2b.framing import HTTP_STATUS, STREAM_TYPE, ConnectError, trailer
from warmcell.extension.server.e2b.keeper import Keeper
from warmcell.extension.server.e2b.keys import Holder, Keys, Purpose, SignedUrl
from warmcell.extension.server.ports.handler import PassingHandler
from warmcell.sandbox.errors import (
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    UnauthenticatedError,
    WarmcellError,
)
from warmcell.sandbox.ids import known_sandbox_id
from warmcell.sandbox.paths import Paths

ENVD_PORT: Final = 49983
INTERPRETER_PORT: Final = 49999
PREFIX: Final = "/warmcell/e2b"
METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
UPLOAD_MAX_BYTES: Final = 2**40
CONTROL: Final = re.compile(r"/(v\d/)?(sandboxes|snapshots|templates|default-templates|volumes|secrets)(/.*)?")

Surface = Literal["control", "envd", "interpreter", "port"]
SURFACES: Final[Mapping[int, Surface]] = {ENVD_PORT: "envd", INTERPRETER_PORT: "interpreter"}
"""Ports that are ours; whatever listens on the others is the sandbox's."""

Serve = Callable[["E2bHandler"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Verb:
    """One call: how it looks, and what serves it. `opens` are the tokens with which one may; none: who has the URL."""

    surface: Surface
    methods: str
    path: str
    serve: Serve
    opens: tuple[Purpose, ...] = ("envd",)


@dataclass(frozen=True, slots=True)
class Target:
    """The sandbox and the port of it that a request is for."""

    sandbox_id: str
    port: int
    by_host: bool = False


def target(headers: Mapping[str, str], host: str, hosts: re.Pattern[str] | None) -> Target | None:
    """By its headers, else by its host where that is one of `hosts`; None: it is for the control plane.

    Raises:
        InvalidRequestError: They make no sense.
    """
    sandbox_id, port = headers.get("E2b-Sandbox-Id"), headers.get("E2b-Sandbox-Port")
    if sandbox_id is None and port is None:
        match = None if hosts is None else hosts.fullmatch(host.lower())
        return None if match is None else Target(match[2], int(match[1]), by_host=True)
    if sandbox_id is None or port is None or not re.fullmatch(r"\d{1,5}", port):
        raise InvalidRequestError(
            "A request to a sandbox names it and a port", hint="Send E2b-Sandbox-Id and E2b-Sandbox-Port."
        )
    return Target(sandbox_id, int(port))


@web.stream_request_body
class E2bHandler(PassingHandler):
    """Finds the verb, serves it while the body still comes, and tells errors as that surface does."""

    surface: Surface = "control"
    sandbox_id: str = ""
    port = 0
    by_host = False
    """Whether the request names the sandbox and the port by its host alone."""
    target = ""
    """Path and query of the request, below whatever path of ours."""
    groups: Mapping[str, str]
    keeper: Keeper
    _token_id = ""
    """Of the principal's token that is the API key."""
    _work: "asyncio.Task[None] | None" = None

    def initialize(self, verbs: tuple[Verb, ...]) -> None:
        """`verbs` is the table."""
        self.verbs = verbs
        self.body_stream = Body(self.settings.get("warmcell_patience_s", PATIENCE_S))

    @property
    def keys(self) -> Keys:
        """Those for whoever asks; read or made when first needed."""
        keys: Keys | None = self.settings.get("warmcell_e2b_keys")
        if keys is None:
            keys = self.settings["warmcell_e2b_keys"] = Keys.load(Paths.default().e2b_key)
        return replace(keys, token_id=self._token_id)

    def argument(self, name: str) -> str | None:
        """One parameter of the query; None where it is absent.

        Raises:
            InvalidRequestError: It is no text.
        """
        values = self.request.query_arguments.get(name)
        if not values:
            return None
        try:  # As it is: tornado would take another character for some.
            return values[-1].decode()
        except UnicodeDecodeError:
            raise InvalidRequestError(f"{name} is no UTF-8", hint="Encode it as UTF-8, then for a URL.") from None

    async def prepare(self) -> None:  # type: ignore[override] # as jupyter_server's own
        """Begin to serve: a body may be longer than memory, or come bit by bit for hours."""
        if self.request.method not in METHODS and not self._is_for_port():
            return
        if self._upload_possible():
            cast(Any, self.request.connection).set_max_body_size(UPLOAD_MAX_BYTES)
        self._work = asyncio.create_task(self._serve())

    async def data_received(self, chunk: bytes) -> None:
        """A part of the body has come (tornado's hook)."""
        await self.body_stream.put(chunk)

    @allow_unauthenticated
    async def post(self, *_: str) -> None:
        """Whoever asks is looked at in `_serve`: by E2B's own headers, and then by Jupyter's hooks."""
        assert self._work is not None
        await self.body_stream.put(None)
        try:
            await self._work
        except asyncio.CancelledError:
            if not self._gone():
                raise

    get = put = patch = delete = head = post  # one way for all of them

    @allow_unauthenticated
    async def options(self, *_: str) -> None:  # type: ignore[override] # tornado awaits it
        """Of a port it is whatever listens there that answers."""
        if self._work is None:
            super().options()
        else:
            await self.post()

    def check_xsrf_cookie(self) -> None:
        """No cookie counts here, so none can be abused."""

    def on_connection_close(self) -> None:
        """The client has gone (tornado's hook): what it waits for ends."""
        super().on_connection_close()
        if self._work is not None:
            self._work.cancel()

    def on_finish(self) -> None:
        """The answer is out (tornado's hook)."""
        self.body_stream.drop()

    def answer(self, what: Any, status: int = 200) -> None:
        """Finish with JSON, or with nothing where there is nothing to say."""
        self.set_status(status)
        if what is None:
            self.clear_header("Content-Type")
            self.finish()
            return
        self.set_header("Content-Type", "application/json")
        self.finish(failures.encoded(what))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """An accident, or a request that is none: in E2B's form."""
        self.answer(failures.body(status_code, self._reason), status_code)

    @property
    def streams(self) -> bool:
        """Whether a part of the answer is out."""
        return bool(self._headers_written)

    async def tell(self, data: bytes) -> None:
        """Send a piece of a stream."""
        self.write(data)
        await self.flush()

    async def _serve(self) -> None:
        try:
            verb = self._find()
            if verb.surface == "control":
                self.keeper = Keeper(self.link, await self._caller())
            elif verb.opens:
                self.keeper = Keeper.of(self.link, await self._opened(verb))
            await verb.serve(self)
        except StreamClosedError:
            return  # the client has gone
        except (WarmcellError, ConnectError) as error:
            await self.body_stream.drain()  # a connection is closed on whom the answer comes too early
            self._tell_failure(error)
        finally:
            self.body_stream.drop()

    def _find(self) -> Verb:
        before, prefix, below = self.request.path.partition(PREFIX + "/")
        path = f"/{below}" if prefix else before
        asks_control = "X-API-KEY" in self.request.headers and CONTROL.fullmatch(path) is not None
        # Some clients name a sandbox in calls of the control plane, too.
        found = None if asks_control else self._named()
        self.target = path + str(self.request.uri)[len(self.request.path) :]
        if found is None and not asks_control and path == "/files":
            self.surface = "envd"  # a signed URL, which names no sandbox
        elif found is not None:
            self.surface = self._surface_of(found)
            if self.surface == "port":
                return Verb("port", "", "", ports.serve, ())
        known = False
        for verb in self.verbs:
            match = re.fullmatch(verb.path, path) if verb.surface == self.surface else None
            if match is not None:
                known = True
                if self.request.method in verb.methods.split("|"):
                    self.groups = match.groupdict()
                    return verb
        what = f"{self.request.method} {path}"
        if known:
            raise InvalidRequestError(f"{what} is not there", hint="The path is, with another method.")
        raise NotFoundError(f"{what} is not part of E2B's wire here", hint="See docs/reference/e2b.md.")

    def _surface_of(self, found: Target) -> Surface:
        sandbox_id = known_sandbox_id(found.sandbox_id)
        self.sandbox_id, self.port, self.by_host = sandbox_id or "", found.port, found.by_host
        self.surface = SURFACES.get(found.port, "port")
        if sandbox_id is None:
            raise failures.unknown_sandbox(found.sandbox_id)
        return self.surface

    def _named(self) -> Target | None:
        return target(self.request.headers, self.request.host, self.settings["warmcell_e2b_hosts"])

    def _is_for_port(self) -> bool:
        try:
            found = self._named()
        except InvalidRequestError:
            return False
        return found is not None and found.port not in SURFACES

    async def _caller(self) -> dict[str, str]:
        """What tells the keeper who asks for something of the control plane.

        Raises:
            UnauthenticatedError: Nobody that is known.
            ForbiddenError: One who may not.
        """
        key = self.request.headers.get("X-API-KEY", "")
        if key.startswith(TOKEN_PREFIX):
            self._token_id = token_id(key)
            return {"Authorization": f"Bearer {key}"}  # which the keeper looks at
        self.request.headers["Authorization"] = f"token {key}"
        user = self.identity_provider.get_user(self) if key else None
        if isinstance(user, Awaitable):
            user = await user
        self.current_user = self._jupyter_current_user = user
        if user is None or not self.identity_provider.is_token_authenticated(self):
            raise UnauthenticatedError(
                "The API key is not valid",
                hint="Set E2B_API_KEY to a token of `warmcell token create`, or the server's.",
            )
        action = "read" if self.request.method == "GET" else "write"
        allowed = self.authorizer.is_authorized(self, user, action, AUTH_RESOURCE)
        if isinstance(allowed, Awaitable):
            allowed = await allowed
        if not allowed:
            raise ForbiddenError("The server does not allow that", hint="Ask whoever runs it.")
        return {}

    async def _opened(self, verb: Verb) -> Holder:
        """For whom it is opened, by a token of the sandbox or a signed URL."""
        token = self.request.headers.get("X-Access-Token")
        if token is None and verb.path == "/files" and self.argument("signature") is not None:
            return await self._signed()
        if token is None and "traffic" in verb.opens:
            token = self.request.headers.get("E2b-Traffic-Access-Token")
        return self.keys.whose(token or "", self.sandbox_id, *verb.opens)

    async def _signed(self) -> Holder:
        """As `_opened`, by a URL's signature; where nothing else names the sandbox, that does."""
        expires = self.argument("signature_expiration")
        if expires is not None and not re.fullmatch(r"\d{1,12}", expires):
            raise InvalidRequestError("signature_expiration must be a Unix time", hint="Have the URL made again.")
        signed = SignedUrl(
            path=self.argument("path") or "",
            operation="read" if self.request.method == "GET" else "write",
            user=self.argument("username") or "",
            expires_at=None if expires is None else int(expires),
        )
        signed.check_time()
        tokens = (await self.link.get("/tokens"))["tokens"]
        infos = (await self.link.get("/sandboxes"))["sandboxes"]
        # Many of each are many digests, for a caller of whom nothing is known.
        found = await asyncio.to_thread(self._signer, signed, infos, tokens, self.argument("signature") or "")
        if found is None:
            raise UnauthenticatedError("The signature does not fit", hint="Have the URL made again.")
        self.sandbox_id, holder = found
        return holder

    def _signer(
        self, signed: SignedUrl, infos: Sequence[Mapping[str, Any]], tokens: Sequence[Mapping[str, Any]], signature: str
    ) -> tuple[str, Holder] | None:
        """The sandbox, and who has signed its URL. Blocks."""
        ours = [info for info in infos if self.sandbox_id in ("", info["id"]) and info.get("terms") is not None]
        holders = [(info["id"], Holder(info["principal"])) for info in ours]
        holders += [
            (info["id"], Holder(info["principal"], one["id"]))
            for info in ours
            for one in tokens
            if one["principal"] == info["principal"]
        ]
        return self.keys.signer(holders, signed, signature)

    def _tell_failure(self, error: WarmcellError | ConnectError) -> None:
        if isinstance(error, WarmcellError):
            self.log.info("E2B %s %s: %s", self.request.method, self.request.path, error)
        if self._headers_written:
            if self._is_call():
                self.write(trailer(_connect(error)))
                self.finish()
            else:  # a stream that breaks off is no answer
                cast(Any, self.request.connection).stream.close()
        elif self._is_call():
            failed = _connect(error)
            if self.request.headers.get("Content-Type", "").startswith(STREAM_TYPE):
                self.finish(trailer(failed), set_content_type=STREAM_TYPE)
            else:
                self.answer(failed.to_json(), HTTP_STATUS[failed.code])
        else:
            assert isinstance(error, WarmcellError)
            status, body, headers = (
                failures.control(error) if self.surface == "control" else (*failures.data(error), {})
            )
            for name, value in headers.items():
                self.set_header(name, value)
            self.answer(body, status)

    def _is_call(self) -> bool:
        return re.search(r"/(process\.Process|filesystem\.Filesystem)/", self.request.path) is not None

    def _upload_possible(self) -> bool:
        return self.request.path.endswith("/files") or self._is_for_port()

    def _gone(self) -> bool:
        connection: Any = self.request.connection
        return connection.stream is None or connection.stream.closed()


def _connect(error: WarmcellError | ConnectError) -> ConnectError:
    return error if isinstance(error, ConnectError) else failures.connect(error)
