"""MCP servers of a sandbox behind one address: `mcp-gateway --config JSON`, as E2B's clients start it.

The servers run here as processes over standard input and output; the gateway serves the tools, prompts and resources of
all of them at `/mcp` on port 50005, over streamable HTTP, to who shows its token. The command ends when they are up and
the gateway stays, or with a line that says what is wrong, and then nothing stays.

It speaks through the official package `mcp` of the environment's Python, so it knows the revisions of the protocol that
this knows.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

PORT = 50005
PLACE = "~/.mcp-gateway"
"""Has the token, the log, and repositories."""

LISTING_S = 10.0
"""How long a server has to tell what it has."""

CATALOGUE = "mcp-server-"
"""How programs of servers begin that are known by their name alone."""

REPOSITORY = re.compile(r"github/([A-Za-z0-9_.-]+)/([A-Za-z0-9_.-]+)")
CHANGES_NOTHING = ("installCmd", "runCmd")
NEEDS_PACKAGE = (
    "mcp-gateway needs the package mcp in the sandbox's Python: take an environment or an image with mcp>=2.3"
)


_PR_SET_PDEATHSIG = 1


class Wrong(Exception):
    """It cannot begin, and this is why and what helps."""


@dataclass
class Wanted:
    """One server of the configuration."""

    name: str
    command: str
    """For a shell."""
    env: dict[str, str] = field(default_factory=dict)
    install: str = ""
    repository: str = ""
    """Where it is cloned from; empty: from nowhere."""


def wanted(config: str, which: Any = shutil.which) -> list[Wanted]:
    """The servers that a configuration asks for.

    Args:
        config: JSON: name of a server to its settings.
        which: Finds a program.

    Raises:
        Wrong: It is of another form, or names a server that is not there.
    """
    try:
        asked = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise Wrong(f"--config is not JSON: {error}") from None
    if not isinstance(asked, dict) or not asked or not all(isinstance(one, dict) for one in asked.values()):
        raise Wrong('--config must be an object that names servers, as in {"time": {}}')
    found = [_one(name, settings, which) for name, settings in asked.items()]
    for one in found:
        _check(one)
    return found


def _check(server: Wanted) -> None:
    """That it can be handed to a process at all."""
    texts = "".join((server.name, server.command, server.install, *server.env, *server.env.values()))
    try:
        texts.encode()
    except UnicodeEncodeError:
        raise Wrong(f"{server.name!r}: its settings have what is no text") from None
    if "\0" in texts:
        raise Wrong(f"{server.name!r}: its settings have a null byte")
    if any(not name or "=" in name for name in server.env):
        raise Wrong(f"{server.name}: a setting has a name that no variable can have")


def _one(name: str, settings: dict[str, Any], which: Any) -> Wanted:
    match = REPOSITORY.fullmatch(name)
    if match is None and "/" in name:
        raise Wrong(f"{name}: a server is named by the catalogue, or github/OWNER/REPOSITORY")
    if match is not None or "runCmd" in settings:
        command, install = settings.get("runCmd"), settings.get("installCmd", "")
        if not isinstance(command, str) or not command or not isinstance(install, str):
            raise Wrong(f"{name}: runCmd must be the command that starts it, installCmd another one or absent")
        repository = "" if match is None else f"https://github.com/{match[1]}/{match[2]}"
        return Wanted(name, command, _variables(settings), install, repository)
    program = CATALOGUE + re.sub("[A-Z]", lambda letter: "-" + letter[0].lower(), name)
    if which(program) is None:
        raise Wrong(
            f"{name}: there is no program {program} in this sandbox; the catalogue's servers are images of containers, "
            "which do not run in sandboxes: take an image or a snapshot with the program, or give its runCmd"
        )
    return Wanted(name, program, _variables(settings))


def _variables(settings: dict[str, Any]) -> dict[str, str]:
    """Settings as variables, `githubPersonalAccessToken` as GITHUB_PERSONAL_ACCESS_TOKEN."""
    found = {}
    for name, value in settings.items():
        if name not in CHANGES_NOTHING:
            text = value if isinstance(value, str) else json.dumps(value)
            found[re.sub("(?<=[a-z0-9])([A-Z])", r"_\1", name).replace("-", "_").upper()] = text
    return found


def named(lists: Sequence[tuple[str, Sequence[str]]]) -> dict[str, tuple[int, str]]:
    """What clients call each tool or prompt, to its server's place and its own name there.

    Where two servers have the same, it goes by the server's name, too.
    """
    every = [name for _, names in lists for name in names]
    found: dict[str, tuple[int, str]] = {}
    for place, (server, names) in enumerate(lists):
        for name in names:
            shown = name
            if every.count(name) > 1:
                shown = f"{re.sub('[^A-Za-z0-9_-]', '_', server)}__{name}"
                while shown in found or shown in every:
                    shown += "_"
            found[shown] = (place, name)
    return found


def main(arguments: Sequence[str]) -> None:
    """Begin, and say on standard error why not."""
    parser = argparse.ArgumentParser(prog="mcp-gateway")
    parser.add_argument("--config", required=True, help="servers, as JSON")
    try:
        _begin(parser.parse_args(arguments).config)
    except Wrong as wrong:
        sys.exit(f"mcp-gateway: {wrong}")


def _begin(config: str) -> None:
    token = os.environ.pop("GATEWAY_ACCESS_TOKEN", "")
    if not token:
        raise Wrong("GATEWAY_ACCESS_TOKEN must have the token that clients are to show")
    servers = wanted(config)
    try:
        import mcp.server.lowlevel
        import uvicorn  # noqa: F401 - mcp's own
    except ImportError:
        raise Wrong(NEEDS_PACKAGE) from None
    if not hasattr(mcp, "Client"):
        raise Wrong(NEEDS_PACKAGE)
    place = os.path.expanduser(PLACE)
    os.makedirs(place, mode=0o700, exist_ok=True)
    hear, tell = os.pipe()
    own = os.getpid()
    child = os.fork()
    if child == 0:
        _stay(own, place, tell, servers, token)
    os.close(tell)
    with open(hear, encoding="utf-8") as said:
        answer = said.read()  # To its end: then it is up, or has ended.
    if answer != "up":
        os.waitpid(child, 0)
        raise Wrong(answer or f"it has ended: see {PLACE}/gateway.log")


def _stay(parent: int, place: str, tell: int, servers: list[Wanted], token: str) -> NoReturn:
    """What becomes of the process that is the gateway. Until it is up it ends with its parent."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
        _end_with_parent(signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(code)
        log = os.open(os.path.join(place, "gateway.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(source, target)
        import asyncio

        asyncio.run(_serve(place, tell, servers, token))
        code = 0
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            os.write(tell, _why(error).encode())
    finally:
        os._exit(code)


def _end_with_parent(signum: int) -> None:
    """Get that signal when the parent ends; 0: none any more."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


def _listening() -> socket.socket:
    """The port, with nobody served yet.

    Raises:
        Wrong: Another has it.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", PORT))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise Wrong(f"port {PORT} is taken ({error.strerror}): a gateway runs already") from None
    return listener


def _why(error: BaseException) -> str:
    inner = getattr(error, "exceptions", None)
    return _why(inner[0]) if inner else str(error) or type(error).__name__


async def _serve(place: str, tell: int, servers: list[Wanted], token: str) -> None:
    import asyncio

    import uvicorn
    from mcp.server.transport_security import TransportSecuritySettings

    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for server in servers:
            directory = await loop.run_in_executor(None, _prepared, place, server)
            clients.append((server.name, await _started(stack, server, directory)))
        # Who comes here shows a token, whatever host they call it by.
        anywhere = TransportSecuritySettings(enable_dns_rebinding_protection=False)
        application = _gateway(clients).streamable_http_app(transport_security=anywhere)
        config = uvicorn.Config(_guarded(application, token), log_level="warning")
        serving = uvicorn.Server(config)
        listener = _listening()
        _keep(os.path.join(place, "token"), token)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _end_with_parent(0)
        os.write(tell, b"up")
        os.close(tell)
        await serving.serve(sockets=[listener])


def _keep(path: str, token: str) -> None:
    """Clients that connect to a sandbox later look for it there."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(token)


def _prepared(place: str, server: Wanted) -> str:
    """The directory in which it is to run, with what it needs; takes as long as that takes.

    Raises:
        Wrong: It cannot be cloned, or its installation fails.
    """
    directory = os.path.expanduser("~")
    if server.repository:
        directory = os.path.join(place, server.name.replace("/", "-"))
        if not os.path.isdir(directory):
            whole = directory + ".new"  # It is killed with whoever gives up the command: half of one is none.
            shutil.rmtree(whole, ignore_errors=True)
            clone = ["git", "clone", "--quiet", "--depth", "1", server.repository, whole]
            _done(server, clone, None, "it cannot be cloned (sandboxes reach hosts that network.allowOut names)")
            os.rename(whole, directory)
    if server.install:
        _done(server, ["/bin/bash", "-c", server.install], directory, "its installCmd failed")
    return directory


def _done(server: Wanted, command: list[str], directory: str | None, what: str) -> None:
    try:
        done = subprocess.run(command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        raise Wrong(f"{server.name}: {what}: {error}") from None
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise Wrong(f"{server.name}: {what}: {' '.join(said) or f'exit code {done.returncode}'}")


async def _started(stack: contextlib.AsyncExitStack, server: Wanted, directory: str) -> Any:
    """A client of it.

    Raises:
        Wrong: It does not answer as a server of MCP.
    """
    from mcp import Client, StdioServerParameters

    how = StdioServerParameters(
        command="/bin/bash", args=["-c", server.command], env={**os.environ, **server.env}, cwd=directory
    )
    try:
        return await stack.enter_async_context(Client(how, cache=None))
    except Exception as error:
        raise Wrong(f"{server.name}: it did not start as a server of MCP over stdio: {_why(error)}") from error


def _guarded(application: Any, token: str) -> Any:
    """The same for who shows the token."""
    import hmac

    good = f"Bearer {token}".encode()

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), good):
            headers = [(b"www-authenticate", b"Bearer"), (b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b"Send the gateway's token as Authorization: Bearer\n"})
        else:
            await application(scope, receive, send)

    return serve


def _gateway(clients: Sequence[tuple[str, Any]]) -> Any:
    """A server that has what these servers have."""
    import asyncio

    import mcp_types as types
    from mcp import MCPError
    from mcp.server.lowlevel import Server

    def having(capability: str) -> list[tuple[str, Any]]:
        return [one for one in clients if getattr(one[1].server_capabilities, capability) is not None]

    async def pages(client: Any, what: str) -> list[Any]:
        ones: list[Any] = []
        cursor = None
        while True:
            page = await getattr(client, f"list_{what}")(cursor=cursor)
            ones += getattr(page, what)
            cursor = page.next_cursor
            if cursor is None:
                return ones

    async def listed(capability: str, what: str) -> list[tuple[str, Any, list[Any]]]:
        """Of each server all of a kind; one that has ended or does not answer has none."""

        async def of(name: str, client: Any) -> tuple[str, Any, list[Any]]:
            try:
                return name, client, await asyncio.wait_for(pages(client, what), LISTING_S)
            except Exception as error:
                sys.stderr.write(f"{name} does not tell its {what}: {_why(error)}\n")
                return name, client, []

        return await asyncio.gather(*(of(name, client) for name, client in having(capability)))

    known: dict[tuple[str, str], tuple[Any, str]] = {}
    """Whose a tool or a prompt was when they were listed last, and its own name there."""

    async def shown(kind: str) -> list[Any]:
        """Tools or prompts, as clients of the gateway see them."""
        lists = await listed(kind, kind)
        places = named([(name, [one.name for one in ones]) for name, _, ones in lists])
        mine = {place: name for name, place in places.items()}
        known.update({(kind, name): (lists[place][1], own) for name, (place, own) in places.items()})
        return [
            one.model_copy(update={"name": mine[place, one.name]})
            for place, (_, _, ones) in enumerate(lists)
            for one in ones
        ]

    async def whose(kind: str, name: str) -> tuple[Any, str]:
        if (kind, name) not in known:
            await shown(kind)
        if (kind, name) not in known:
            raise MCPError(types.INVALID_PARAMS, f"There is no {name!r} among the {kind} of this gateway's servers")
        return known[kind, name]

    async def list_tools(context: Any, params: Any) -> Any:
        return types.ListToolsResult(tools=await shown("tools"))

    async def call_tool(context: Any, params: Any) -> Any:
        client, name = await whose("tools", params.name)
        return await client.call_tool(name, params.arguments, progress_callback=context.session.report_progress)

    async def list_prompts(context: Any, params: Any) -> Any:
        return types.ListPromptsResult(prompts=await shown("prompts"))

    async def get_prompt(context: Any, params: Any) -> Any:
        client, name = await whose("prompts", params.name)
        return await client.get_prompt(name, params.arguments)

    async def list_resources(context: Any, params: Any) -> Any:
        found = await listed("resources", "resources")
        return types.ListResourcesResult(resources=[one for _, _, ones in found for one in ones])

    async def list_templates(context: Any, params: Any) -> Any:
        found = await listed("resources", "resource_templates")
        return types.ListResourceTemplatesResult(resource_templates=[one for _, _, ones in found for one in ones])

    async def read_resource(context: Any, params: Any) -> Any:
        missing = MCPError(types.INVALID_PARAMS, f"No server of this gateway has {params.uri}")
        for _, client in having("resources"):  # Templates do not say whose an address is: the first that knows it.
            try:
                return await client.read_resource(params.uri)
            except MCPError as error:
                missing = error
        raise missing

    handlers: dict[str, Any] = {"on_list_tools": list_tools, "on_call_tool": call_tool}
    if having("prompts"):
        handlers |= {"on_list_prompts": list_prompts, "on_get_prompt": get_prompt}
    if having("resources"):
        handlers |= {"on_list_resources": list_resources, "on_list_resource_templates": list_templates}
        handlers |= {"on_read_resource": read_resource}
    return Server("mcp-gateway", **handlers)
