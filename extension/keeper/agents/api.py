"""REST of the sandboxes that code asks for, `/warmcell/api/v1/sandboxes/{id}/…`. Handlers translate, no more."""

import asyncio
import base64
import contextlib
import json
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from tornado.iostream import StreamClosedError

from warmcell.extension.keeper.agents import checks, metrics
from warmcell.extension.keeper.agents.agents import Agents
from warmcell.extension.keeper.agents.boxes import AgentBox
from warmcell.extension.keeper.agents.commands import Command, size_of
from warmcell.extension.keeper.agents.files_api import done
from warmcell.extension.keeper.agents.files_api import routes as files_routes
from warmcell.extension.keeper.agents.once import GIVEN_UP_S, checked_key
from warmcell.extension.keeper.agents.output import Output
from warmcell.extension.keeper.agents.runs import Run
from warmcell.extension.keeper.http import JsonHandler
from warmcell.sandbox.errors import InvalidRequestError, UnauthenticatedError, WarmcellError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId, SandboxInfo, Terms

LONGEST_WAIT_S = 300.0
SIGNAL_MAX = 64
LISTED_MAX = 1000
TAGS_MAX, TAG_MAX = 64, 1024
TLS_PORTS_MAX = 64
TERMS = ("timeout_s", "on_timeout", "auto_resume", "keeps_memory", "tags", "port_host", "tls_ports")
MERGE = "merge_tags"

_HOST = re.compile(r"(?:[A-Za-z0-9._-]|\$\{PORT\}){1,253}(?::(?:[0-9]{1,5}|\$\{PORT\}))?")

BOX = r"/sandboxes/([a-z0-9]+)"
ITEM = r"([a-z0-9]{1,32})"


def routes() -> list[tuple[str, type[JsonHandler]]]:
    """Paths below the API's prefix."""
    return [
        (rf"{BOX}/(connect|metrics)", BoxHandler),
        (rf"{BOX}/commands", CommandsHandler),
        (rf"{BOX}/commands/{ITEM}", CommandHandler),
        (rf"{BOX}/commands/{ITEM}/output", CommandOutputHandler),
        (rf"{BOX}/commands/{ITEM}/(stdin|signal|resize)", CommandVerbHandler),
        (rf"{BOX}/runs", RunsHandler),
        (rf"{BOX}/runs/{ITEM}", RunHandler),
        (rf"{BOX}/runs/{ITEM}/output", RunOutputHandler),
        (rf"{BOX}/contexts", ContextsHandler),
        (rf"{BOX}/contexts/([A-Za-z0-9_-]+)", ContextHandler),
        (rf"{BOX}/contexts/([A-Za-z0-9_-]+)/restart", ContextHandler),
        *files_routes(),
    ]


class Handler(JsonHandler):
    """Access to the sandboxes, and streams."""

    @property
    def agents(self) -> Agents:
        agents: Agents = self.settings["keeper"].agents
        return agents

    def box(self, sandbox_id: str) -> AgentBox:
        """What hangs on it, whatever its state; raises as `Agents.of`."""
        return self.agents.of(SandboxId(sandbox_id))

    async def awake(self, sandbox_id: str, *, gpu: bool = False) -> AgentBox:
        """As `box`, of one that runs; raises as `Agents.awake`."""
        return await self.unless_gone(self.agents.awake(SandboxId(sandbox_id), gpu=gpu))

    def query(self, name: str, default: str) -> str:
        """A parameter of the query."""
        return self.get_query_argument(name, default)

    async def wait_s(self, output: Output) -> None:
        """Wait for the end of something, for as long as `?wait=` says."""
        wait = checks.number(self.query("wait", "0"), "wait", most=LONGEST_WAIT_S)
        if wait:
            await self.unless_gone(output.wait(wait))

    async def follow(self, output: Output, head: Mapping[str, Any] | None, info: Callable[[], Any], name: str) -> None:
        """Answer with what something says, as it comes."""
        start = int(checks.number(self.query("from", "0"), "from", most=2**53))
        self.set_header("Content-Type", "application/x-ndjson")
        if self.query("until", "end") == "now":
            lines, until = output.present(start)
            self.finish(lines + json.dumps({"next": until, name: info()}).encode() + b"\n")
            return
        with contextlib.suppress(StreamClosedError), output.expecting():  # Whoever reads has gone; it goes on.
            try:
                await self.unless_gone(self._send(output.follow(start), head, info))
            except UnauthenticatedError as error:  # So that it is not taken for a connection that broke.
                self.write(json.dumps({"refused": error.to_json()}).encode() + b"\n")
                await self.flush()

    async def _send(
        self, lines: AsyncGenerator[bytes], head: Mapping[str, Any] | None, info: Callable[[], Any]
    ) -> None:
        async with contextlib.aclosing(lines):
            if head is not None:
                self.write(json.dumps(head).encode() + b"\n")
            await self.flush()
            async for piece in lines:
                self.write(piece)
                await self.flush()
        self.write(json.dumps({"ended": info()}).encode() + b"\n")
        await self.flush()


class BoxHandler(Handler):
    """One sandbox: wake it, or see what it uses."""

    async def post(self, sandbox_id: str, verb: str) -> None:
        _only(verb, "connect")
        body = self.body()
        agents, box = self.agents, self.box(sandbox_id)
        await self.unless_gone(agents.wake(box.sandbox_id, memory=checks.flag(body, "memory", True)))
        terms = agents.live(box.sandbox_id).info.terms
        assert terms is not None
        timeout_s = checks.seconds(body, "timeout_s", terms.timeout_s)
        self.answer(agents.set_terms(box.sandbox_id, timeout_s=timeout_s).to_json())

    async def get(self, sandbox_id: str, verb: str) -> None:
        _only(verb, "metrics")
        live = self.agents.live(self.box(sandbox_id).sandbox_id)
        found = await asyncio.to_thread(metrics.measure, live)
        frozen = live.info.terms is not None and live.info.terms.frozen
        if self.query("disk", "0") == "1" and live.info.state is State.RUNNING and not frozen:
            with contextlib.suppress(
                WarmcellError
            ):  # It may be on its way to sleep, which this is not to keep it from.
                found["disk_used_bytes"] = (await done(self.agents, live.info.id, {"op": "room"}))["used_bytes"]
        self.answer(found)


class CommandsHandler(Handler):
    """Processes in a sandbox."""

    def get(self, sandbox_id: str) -> None:
        self.answer({"commands": [one.info() for one in self.box(sandbox_id).commands.all()]})

    async def post(self, sandbox_id: str) -> None:
        body = self.body()
        box = self.box(sandbox_id)
        command = box.commands.known(body)  # It is not woken, nor anything done, for what was done already.
        if command is None:
            box = await self.awake(sandbox_id, gpu=True)
        command = await box.commands.start(self.agents.live(box.sandbox_id), body)
        if self.query("follow", "0") == "1":
            await self.follow(command.output, {"command": command.info()}, command.info, "command")
        else:
            self.answer(command.info(), 201)


class _CommandHandler(Handler):
    def command(self, sandbox_id: str, command_id: str) -> Command:
        """One of its commands; raises NotFoundError."""
        return self.box(sandbox_id).commands.get(command_id)


class CommandHandler(_CommandHandler):
    """One process."""

    async def get(self, sandbox_id: str, command_id: str) -> None:
        command = self.command(sandbox_id, command_id)
        await self.wait_s(command.output)
        self.answer(command.info())

    async def delete(self, sandbox_id: str, command_id: str) -> None:
        await self.command(sandbox_id, command_id).close()
        self.set_status(204)


class CommandOutputHandler(_CommandHandler):
    """What it has said, and says."""

    async def get(self, sandbox_id: str, command_id: str) -> None:
        command = self.command(sandbox_id, command_id)
        await self.follow(command.output, None, command.info, "command")


class CommandVerbHandler(_CommandHandler):
    """Input, signals, and the size of its terminal."""

    async def post(self, sandbox_id: str, command_id: str, verb: str) -> None:
        command = self.command(sandbox_id, command_id)
        await self.agents.awake(SandboxId(sandbox_id))
        if verb == "stdin":
            if "at" in self.request.query_arguments:  # As it was once; to pass over it would take a repeat twice.
                raise InvalidRequestError("Input has no offset", hint="Send it with an Idempotency-Key.")
            key, close = self.request.headers.get("Idempotency-Key"), self.query("close", "0") == "1"
            writing = command.write(self.request.body, key=None if key is None else checked_key(key), close=close)
            self.answer({"received": await self.unless_gone(writing)})
            return
        body = self.body()
        if verb == "signal":
            await command.signal(checks.whole(body, "signum", least=1, most=SIGNAL_MAX))
        else:
            await command.resize(*size_of(body))
        self.answer({})


class RunsHandler(Handler):
    """Code in a sandbox's kernel."""

    def get(self, sandbox_id: str) -> None:
        self.answer({"runs": [one.info() for one in self.box(sandbox_id).runs.all()]})

    async def post(self, sandbox_id: str) -> None:
        body = self.body()
        box = self.box(sandbox_id)
        run = box.runs.known(body)
        if run is None:
            box = await self.awake(sandbox_id)
        run = box.runs.start(body)
        if self.query("follow", "0") == "1":
            await self.follow(run.output, {"run": run.info()}, run.info, "run")
        else:
            self.answer(run.info(), 201)


class _RunHandler(Handler):
    def run(self, sandbox_id: str, run_id: str) -> Run:
        """One of its runs; raises NotFoundError."""
        return self.box(sandbox_id).runs.get(run_id)


class RunHandler(_RunHandler):
    """One run."""

    async def get(self, sandbox_id: str, run_id: str) -> None:
        run = self.run(sandbox_id, run_id)
        await self.wait_s(run.output)
        self.answer(run.info())

    async def delete(self, sandbox_id: str, run_id: str) -> None:
        run = self.run(sandbox_id, run_id)
        await self.box(sandbox_id).runs.stop(run)
        self.set_status(204)


class RunOutputHandler(_RunHandler):
    """What it has shown, and shows."""

    async def get(self, sandbox_id: str, run_id: str) -> None:
        run = self.run(sandbox_id, run_id)
        await self.follow(run.output, None, run.info, "run")


class ContextsHandler(Handler):
    """Its kernel's own, and those that are processes of their own below that."""

    def get(self, sandbox_id: str) -> None:
        contexts = self.box(sandbox_id).runs.contexts
        self.answer({"contexts": [{"id": name, "cwd": cwd} for name, cwd in contexts.items()]})

    async def post(self, sandbox_id: str) -> None:
        body = self.body()
        box = await self.awake(sandbox_id)
        self.answer(await box.runs.new_context(body, uuid.uuid4().hex), 201)


class ContextHandler(Handler):
    """One of them."""

    async def delete(self, sandbox_id: str, name: str) -> None:
        box = await self.awake(sandbox_id)
        await box.runs.remove_context(name)
        self.set_status(204)

    async def post(self, sandbox_id: str, name: str) -> None:
        if not self.request.path.endswith("/restart"):
            raise InvalidRequestError("A context is made with POST …/contexts", hint="Or restarted with …/restart.")
        box = await self.awake(sandbox_id)
        self.answer(await box.runs.restart_context(name))


def terms_of(body: Mapping[str, Any]) -> Terms:
    """The terms that a request asks for; raises InvalidRequestError."""
    _known(body)
    tags = checks.strings(body, "tags")
    if len(tags) > TAGS_MAX or any(len(one) > TAG_MAX for tag in tags.items() for one in tag):
        raise InvalidRequestError(
            "Too many tags, or too long ones", hint=f"At most {TAGS_MAX}, names and values up to {TAG_MAX} characters."
        )
    terms = Terms.from_json({**body, "tags": tags, "timeout_s": _timeout(body)})
    if terms.port_host and not _HOST.fullmatch(terms.port_host):
        raise InvalidRequestError("port_host is no host", hint="As in ${PORT}-app.example.com, or app.example.com:443.")
    if len(terms.tls_ports) > TLS_PORTS_MAX or not all(0 < port < 65536 for port in terms.tls_ports):
        raise InvalidRequestError("tls_ports are no ports, or too many", hint=f"{TLS_PORTS_MAX} of 1 to 65535 at most.")
    return terms


def changes_of(body: Mapping[str, Any], terms: Terms | None = None) -> dict[str, Any]:
    """Which terms a request changes, and to what. Whoever awaits nothing from then on loses no other's change.

    Args:
        body: Terms by their names; `merge_tags` has tags that are set, and with null those that go.
        terms: What the sandbox has until now. None: it is not kept on terms.

    Raises:
        InvalidRequestError: It makes no sense.
    """
    if MERGE in body:
        body = {**body, "tags": _merged(body, {} if terms is None else terms.tags)}
        del body[MERGE]
    _known(body)
    wanted = terms_of(body)
    return {name: getattr(wanted, name) for name in body}


def _merged(body: Mapping[str, Any], tags: Mapping[str, str]) -> dict[str, str]:
    if "tags" in body:
        raise InvalidRequestError(f"`tags` replaces all of them, and `{MERGE}` some", hint="Give one of the two.")
    given = body[MERGE]
    if not isinstance(given, dict):
        raise InvalidRequestError(f"`{MERGE}` must be an object", hint='As in {"NAME": "value", "OTHER": null}.')
    new = checks.strings({MERGE: {name: value for name, value in given.items() if value is not None}}, MERGE)
    return {**{name: value for name, value in tags.items() if name not in given}, **new}


def selected(infos: list[SandboxInfo], handler: JsonHandler) -> tuple[list[SandboxInfo], str | None]:
    """Those that a query asks for, the oldest first, and where the next page begins, if there is one.

    Raises:
        InvalidRequestError: The query makes no sense.
    """
    tags = [tag.partition("=")[::2] for tag in handler.get_query_arguments("tag")]
    states = _states(handler.get_query_argument("state", ""))
    owner = handler.get_query_argument("owner", "")
    after = handler.get_query_argument("after", "")
    place = _place(after) if after else None
    found = [
        info
        for info in infos
        if (not tags or (info.terms is not None and all(info.terms.tags.get(key) == value for key, value in tags)))
        and (not states or info.state in states)
        and (not owner or info.owner == owner)
        and (place is None or (info.created_at, info.id) > place)
    ]
    found.sort(key=lambda info: (info.created_at, info.id))
    limit = handler.get_query_argument("limit", "")
    if not limit:
        return found, None
    page = found[: int(checks.number(limit, "limit", least=1, most=LISTED_MAX))]
    last = page[-1] if len(found) > len(page) else None
    return page, None if last is None else _cursor(last)


def _states(asked: str) -> frozenset[State]:
    """Those that a list is asked for; all, where there are none."""
    try:
        return frozenset(State(one) for one in asked.split(",") if one)
    except ValueError as error:
        known = ", ".join(one.value for one in State)
        raise InvalidRequestError(f"{asked[:80]!r} are no states of sandboxes", hint=f"They are {known}.") from error


def _cursor(info: SandboxInfo) -> str:
    return base64.urlsafe_b64encode(json.dumps([info.created_at, info.id]).encode()).decode().rstrip("=")


def _place(cursor: str) -> tuple[float, str]:
    try:
        at, sandbox_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return float(at), str(sandbox_id)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidRequestError("`after` is no cursor", hint="Give the `next` of the page before.") from error


def _timeout(body: Mapping[str, Any]) -> float | None:
    return checks.seconds(body, "timeout_s", Terms().timeout_s) if "timeout_s" in body else Terms().timeout_s


def _known(body: Mapping[str, Any]) -> None:
    for name in body:
        if name not in TERMS:
            raise InvalidRequestError(f"{name!r} is none of a sandbox's terms", hint=f"They are {', '.join(TERMS)}.")


def _only(verb: str, wanted: str) -> None:
    if verb != wanted:
        raise InvalidRequestError(f"That is not how {verb} is asked for", hint="See the keeper's API.")


async def once(agents: Agents, handler: JsonHandler, work: Callable[[], Awaitable[Any]], *, makes: bool = False) -> Any:
    """Do it once for all requests with the same `Idempotency-Key`; without one, for as long as the caller is there.

    What `makes` sandboxes is given up when nobody waits for it any more: nobody would know of them.
    """
    key = handler.request.headers.get("Idempotency-Key")
    if key is None:
        return await handler.unless_gone(_awaited(work))
    whose, path = handler.principal_name or "", f"{handler.request.method} {handler.request.path}"
    given_up_s, body = GIVEN_UP_S if makes else None, handler.request.body
    return await handler.unless_gone(agents.once.do(whose, path, key, body, work, given_up_s=given_up_s))


async def _awaited(work: Callable[[], Awaitable[Any]]) -> Any:
    return await work()
