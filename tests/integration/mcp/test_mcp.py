"""The MCP server, asked by the official client: over stdio, over HTTP, and in this process."""

import asyncio
import base64
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mcp import Client, MCPError, StdioServerParameters
from mcp_types import CallToolResult, ImageContent, TextContent

from tests.leaks import Places
from warmcell.extension.mcp.callers import Callers
from warmcell.extension.mcp.pages import TEXT_MAX
from warmcell.extension.mcp.server import build
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.client.transport import Where
from warmcell.sandbox.paths import Paths

pytestmark = pytest.mark.bubblewrap

COMMAND = str(Path(sys.executable).parent / "warmcell")
CLIENT_PATIENCE_S = 5
BOX_S = 15
"""A sandbox that is not used for so long is suspended."""
START_TIMEOUT_S = 120
PLAIN = {"preload": []}


@pytest.fixture(autouse=True)
def configured(places: Places) -> None:
    """Sandboxes without templates."""
    directory = places.root / "jupyter" / "config"
    directory.mkdir(parents=True, exist_ok=True)
    lines = ("backend = 'bubblewrap'", "keeper_idle_s = 0.2", "prepared = 0")
    (directory / "jupyter_warmcell_config.py").write_text("\n".join(f"c.Warmcell.{line}" for line in lines))


@contextlib.asynccontextmanager
async def tools(token: str | None = None) -> AsyncIterator[Client]:
    """A client of a server in this process, for the user or whose token that is; its sandboxes go with it."""
    callers = Callers(Where(None, token, Paths.default()))
    async with Client(build(callers, wait_s=60)) as connected:
        yield connected
        left = await connected.call_tool("list_sandboxes")
        for one in [] if left.is_error else said(left)["sandboxes"]:
            await connected.call_tool("kill_sandbox", {"sandbox_id": one["sandbox_id"]})
    await callers.close()


def said(result: CallToolResult) -> dict[str, Any]:
    """What a tool answers, for programs."""
    assert not result.is_error, result.content
    assert isinstance(result.structured_content, dict)
    return result.structured_content


def text(result: CallToolResult) -> str:
    """What a model reads."""
    return "".join(block.text for block in result.content if isinstance(block, TextContent))


@pytest.mark.parametrize("cell_s", [20, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
async def test_a_cell_outlives_what_its_client_waits_for(places: Places, cell_s: int) -> None:
    """Over stdio: the call of a client that waits 5 s dies, the cell of 20 s does not, and polling has its output.

    Until then the client hears of its progress; where it waits less than that itself, no call dies at all. Its sandbox,
    whose time would be over before, is in use as long as somebody polls.
    """
    server = StdioServerParameters(command=COMMAND, args=["mcp", "--wait", "3"], env=dict(places.env))
    heard: list[str | None] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        heard.append(message)

    async with Client(server) as patient:
        box = said(await patient.call_tool("create_sandbox", {**PLAIN, "timeout_s": BOX_S}))["sandbox_id"]
        code = (
            f"import time\nprint('began', flush=True)\ntime.sleep({cell_s})\nprint('ended')\nopen('n', 'a').write('x')"
        )
        with pytest.raises(MCPError, match=r"(?i)timed out"):
            await patient.call_tool(
                "run_code",
                {"sandbox_id": box, "code": code, "wait_s": 600},
                read_timeout_seconds=CLIENT_PATIENCE_S,
                progress_callback=progress,
            )
        assert heard
        assert "running" in str(heard[0])
        work = said(await patient.call_tool("list_work", {"sandbox_id": box}))["work"]
        assert [one["state"] for one in work] == ["running"]
        seen, after, polls, more = "", "", 0, True
        while more:
            ask = {"sandbox_id": box, "handle": work[0]["handle"], "after": after}
            result = await patient.call_tool("read_output", ask, read_timeout_seconds=60)
            seen, polls = seen + text(result), polls + 1
            after, more = said(result)["next"], said(result)["more"]
        assert polls >= 2
        assert seen.count("began\n") == seen.count("ended\n") == 1
        assert text(await patient.call_tool("read_file", {"sandbox_id": box, "path": "n"})) == "x"
        await patient.call_tool("kill_sandbox", {"sandbox_id": box})


async def test_code_commands_and_files(places: Places) -> None:
    """Variables stay, pictures are pictures, failures and exit codes are told, files come back as written."""
    async with tools() as client:
        box = said(await client.call_tool("create_sandbox", PLAIN))["sandbox_id"]

        async def call(tool: str, **arguments: Any) -> CallToolResult:
            return await client.call_tool(tool, {"sandbox_id": box, **arguments})

        await call("run_code", code="x = 41")
        result = await call("run_code", code="import sys\nprint('oops', file=sys.stderr)\nx + 1")
        assert "[stderr]\noops\n" in text(result)
        assert "42\n" in text(result)
        assert (said(result)["status"], said(result)["more"]) == ("ok", False)
        failed = await call("run_code", code="1 / 0")
        assert said(failed)["status"] == "error"
        assert "ZeroDivisionError" in text(failed)
        assert "\x1b" not in text(failed)

        dot = base64.b64encode(b"\x89PNG not really").decode()
        shown = await call(
            "run_code", code=f"from IPython.display import display\ndisplay({{'image/png': '{dot}'}}, raw=True)"
        )
        pictures = [block for block in shown.content if isinstance(block, ImageContent)]
        assert [(picture.mime_type, picture.data) for picture in pictures] == [("image/png", dot)]

        done = await call("exec", command="echo hello; exit 3")
        assert (said(done)["exit_code"], "hello\n" in text(done)) == (3, True)
        assert "a b" in text(await call("exec", command=["echo", "a b"]))
        sleeper = said(await call("exec", command="sleep 600", wait_s=0))
        assert (sleeper["state"], sleeper["more"]) == ("running", True)
        await call("interrupt", handle=sleeper["handle"])
        assert said(await call("read_output", handle=sleeper["handle"]))["exit_code"] > 128

        await call("write_file", path="d/e.txt", text="ä" * (TEXT_MAX + 5))
        assert said(await call("write_file", path="b.bin", data="AP8="))["size_bytes"] == 2
        first = await call("read_file", path="d/e.txt")
        assert text(first).startswith("ä" * TEXT_MAX)
        assert f"5 characters more: offset={TEXT_MAX}" in text(first)
        assert text(await call("read_file", path="d/e.txt", offset=TEXT_MAX)) == "ä" * 5
        assert "no text: 2 bytes" in text(await call("read_file", path="b.bin"))
        listed = said(await call("list_files"))
        assert {"b.bin", "d"} <= {os.path.basename(one["path"]) for one in listed["files"]}
        await call("exec", command="cd d && touch $(seq 100 249)")
        pages = [said(await call("list_files", path="d"))]
        while pages[-1]["next"]:
            pages.append(said(await call("list_files", path="d", after=pages[-1]["next"])))
        names = [[os.path.basename(one["path"]) for one in page["files"]] for page in pages]
        assert names == [[str(n) for n in range(100, 200)], [*(str(n) for n in range(200, 250)), "e.txt"]]
        await call("remove_file", path="d", recursive=True)
        gone = await call("read_file", path="d/e.txt")
        assert gone.is_error
        assert "file_not_found" in text(gone)


async def test_output_without_end_comes_in_pages(places: Places) -> None:
    """Each answer is bounded; together they are all that was printed, nothing twice."""
    async with tools() as client:
        box = said(await client.call_tool("create_sandbox", PLAIN))["sandbox_id"]
        code = "for n in range(30000):\n    print(n)"
        result = await client.call_tool("run_code", {"sandbox_id": box, "code": code})
        seen = ""
        while True:
            assert sum(len(block.text) for block in result.content if isinstance(block, TextContent)) < TEXT_MAX + 500
            seen += "".join(block.text for block in result.content[:-1] if isinstance(block, TextContent))
            if not said(result)["more"]:
                break
            ask = {"sandbox_id": box, "handle": said(result)["handle"], "after": said(result)["next"]}
            result = await client.call_tool("read_output", ask)
        assert seen == "".join(f"{n}\n" for n in range(30000))


async def test_what_cannot_be_is_told_with_its_cure(places: Places) -> None:
    """A tool's failure is for the model to read; it is no failure of the protocol."""
    async with tools() as client:
        for tool, arguments, words in (
            ("run_code", {"sandbox_id": "nosuch", "code": "1"}, "sandbox_not_found"),
            ("run_code", {"sandbox_id": "../snapshots", "code": "1"}, "no sandbox"),
            ("read_output", {"sandbox_id": "nosuch", "handle": "what"}, "no handle"),
            ("read_output", {"sandbox_id": "nosuch", "handle": "run-../x"}, "no handle"),
            ("create_sandbox", {"gpu": "H900"}, "unknown_gpu_kind"),
            ("create_sandbox", {"memory": "lots"}, "no size"),
            ("create_sandbox", {"snapshot": "nosuch"}, "snapshot_not_found"),
        ):
            result = await client.call_tool(tool, arguments)
            assert result.is_error, tool
            assert words in text(result), text(result)


@pytest.mark.criu
async def test_forks_and_snapshots_are_whose_sandbox_it_was(places: Places) -> None:
    """They go on with all variables; to another principal neither clone nor snapshot exists, over any verb."""
    async with await KeeperClient.connect() as keeper:
        ann, bob = [(await keeper.post("/tokens", {"principal": name}))["token"] for name in ("ann", "bob")]
        async with tools(ann) as hers, tools(bob) as his:
            box = said(await hers.call_tool("create_sandbox", PLAIN))["sandbox_id"]
            await hers.call_tool("run_code", {"sandbox_id": box, "code": "x = 40"})
            saved = said(await hers.call_tool("snapshot_sandbox", {"sandbox_id": box, "name": "forty"}))["snapshot"]
            clones = said(await hers.call_tool("fork_sandbox", {"sandbox_id": box, "n": 2}))["sandboxes"]
            later = said(await hers.call_tool("create_sandbox", {"snapshot": "forty"}))["sandbox_id"]
            for number, one in enumerate([box, *(clone["sandbox_id"] for clone in clones), later]):
                result = await hers.call_tool("run_code", {"sandbox_id": one, "code": f"x += {number}\nx"})
                assert f"{40 + number}\n" in text(result)
                assert (await his.call_tool("run_code", {"sandbox_id": one, "code": "x"})).is_error
            assert {one["principal"] for one in (await keeper.get("/sandboxes"))["sandboxes"]} == {"ann"}
            for ref in (saved, "forty"):
                for tool, arguments in (("create_sandbox", {"snapshot": ref}), ("read_file", {"path": ref})):
                    refused = await his.call_tool(tool, {"sandbox_id": box, **arguments})
                    assert "not_found" in text(refused), text(refused)
            named = {"Authorization": f"Bearer {bob}"}
            for method in ("GET", "PATCH", "DELETE"):
                for ref in (saved, "forty", "nosuch"):
                    asked = keeper.stream(
                        method, f"/snapshots/{ref}", headers=named, json={"name": "mine"}, checked=False
                    )
                    async with asked as answer:
                        assert (answer.status_code, json.loads(await answer.aread())["code"]) == (
                            404,
                            "snapshot_not_found",
                        )
            assert [one["name"] for one in (await keeper.get("/snapshots"))["snapshots"] if one["name"]] == ["forty"]
            gone = await keeper.delete("/principals/ann", timeout=None)
            assert (len(gone["sandboxes"]), gone["snapshots"]) == (4, [saved])
            assert (await keeper.get("/snapshots"))["snapshots"] == []
            refused = await hers.call_tool("list_sandboxes")
            assert "unauthenticated" in text(refused)


async def test_over_http_each_token_has_its_own_sandboxes(places: Places) -> None:
    """Without a token there is not even a list of tools; with one, its principal's sandboxes alone, until it ends."""
    async with await KeeperClient.connect() as keeper:
        ann, bob = [(await keeper.post("/tokens", {"principal": name}))["token"] for name in ("ann", "bob")]
    server = await asyncio.create_subprocess_exec(
        *(COMMAND, "mcp", "--http", "--port", "0", "--json"),
        env={**os.environ, **places.env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            url = json.loads(await server.stdout.readline())["url"]
        async with httpx.AsyncClient(timeout=60) as http:
            for token in ("", "Bearer nonsense", f"Bearer {ann[:-1]}~"):
                answer = await http.post(url, json={}, headers={"Authorization": token})
                assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
        async with connected(url, ann) as hers, connected(url, bob) as his:
            box = said(await hers.call_tool("create_sandbox", PLAIN))["sandbox_id"]
            assert said(await his.call_tool("list_sandboxes"))["sandboxes"] == []
            stolen = await his.call_tool("run_code", {"sandbox_id": box, "code": "1"})
            assert stolen.is_error
            assert "sandbox_not_found" in text(stolen)
            result = await hers.call_tool("run_code", {"sandbox_id": box, "code": "6 * 7"})
            assert "42\n" in text(result)
            await hers.call_tool("kill_sandbox", {"sandbox_id": box})
            mine = said(await his.call_tool("create_sandbox", PLAIN))["sandbox_id"]
            code = {"sandbox_id": mine, "code": "import time; time.sleep(600)", "wait_s": 600}
            long = asyncio.create_task(his.call_tool("run_code", code))
            async with await KeeperClient.connect() as keeper, asyncio.timeout(START_TIMEOUT_S):
                while not (await keeper.get(f"/sandboxes/{mine}/runs"))["runs"]:
                    continue
                await keeper.delete(f"/tokens/{bob.partition('_')[2].partition('_')[0]}")
                (ended,) = await asyncio.gather(long, return_exceptions=True)
                assert isinstance(ended, BaseException) or "unauthenticated" in text(ended)
                await keeper.delete(f"/sandboxes/{mine}")
    finally:
        server.terminate()
        async with asyncio.timeout(START_TIMEOUT_S):
            await server.communicate()


@contextlib.asynccontextmanager
async def connected(url: str, token: str) -> AsyncIterator[Client]:
    """A client that shows a token."""
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    headers = {"Authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60) as http,
        Client(streamable_http_client(url, http_client=http)) as made,
    ):
        yield made
