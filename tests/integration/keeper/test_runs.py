"""Cells in a sandbox without a Jupyter client: `POST /sandboxes/{id}/run`."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.guest import values as travelling
from warmcell.sandbox.paths import Paths


class Answer:
    """The lines and the raw tail of a run."""

    def __init__(self, content: bytes) -> None:
        self.lines: list[dict[str, Any]] = []
        while True:
            line, _, content = content.partition(b"\n")
            self.lines.append(json.loads(line))
            if self.lines[-1].get("done"):
                break
        self.done = self.lines.pop()
        self.values = travelling.loads(bytearray(content)) if content else {}

    @property
    def text(self) -> str:
        return "".join(line["content"].get("text", "") for line in self.lines if line["msg_type"] == "stream")


async def run(sandbox_id: str, code: str, *, send: dict[str, Any] | None = None, get: tuple[str, ...] = ()) -> Answer:
    values = travelling.pack(send).stream if send else b""
    load = {"buffers": [], "held": {}, "modules": {}, "tags": {}} if send else None
    head = json.dumps({"code": code, "send": len(values), "load": load, "get": get}).encode() + b"\n"
    transport = httpx.AsyncHTTPTransport(uds=str(Paths.default().keeper_socket))
    async with httpx.AsyncClient(transport=transport, timeout=60) as http:
        response = await http.post(f"http://k/warmcell/api/v1/sandboxes/{sandbox_id}/run", content=head + values)
    assert response.status_code == 200, response.text
    return Answer(response.content)


@pytest.fixture
async def sandbox(keeper: KeeperClient, spec: dict[str, Any]) -> str:
    info = await keeper.post("/sandboxes", {"spec": spec})
    return str(info["id"])


async def test_output_is_streamed_and_state_is_kept(sandbox: str) -> None:
    """Two cells share a namespace; what they print comes back."""
    assert (await run(sandbox, "x = 20; print('one')")).text == "one\n"
    answer = await run(sandbox, "print(x + 1)\nx + 2")
    assert answer.text == "21\n"
    shown = [line for line in answer.lines if line["msg_type"] == "execute_result"]
    assert shown[0]["content"]["data"]["text/plain"] == "22"
    assert answer.done["status"] == "ok"


async def test_values_go_in_and_come_back(sandbox: str) -> None:
    """What is sent is in the namespace; what is asked for comes back as an object."""
    answer = await run(sandbox, "b = [n * 2 for n in a]", send={"a": list(range(1000))}, get=("b",))
    assert answer.values == {"b": [n * 2 for n in range(1000)]}


async def test_an_error_ends_the_run_and_is_shown(sandbox: str) -> None:
    """The traceback comes as a message, and no values are read."""
    answer = await run(sandbox, "y = 1\n1 / 0", get=("y",))
    assert answer.done["status"] == "error"
    assert [line["content"]["ename"] for line in answer.lines if line["msg_type"] == "error"] == ["ZeroDivisionError"]
    assert answer.values == {}


async def test_what_comes_right_after_an_error_runs(sandbox: str) -> None:
    """A kernel throws away what is sent while it recovers from an error; this one would never have done."""
    await run(sandbox, "get_ipython().kernel._post_dummy_stop_aborting_message = lambda subshell: None")
    assert (await run(sandbox, "1 / 0")).done["status"] == "error"
    assert (await run(sandbox, "print('on')")).text == "on\n"


async def test_a_name_that_is_not_there_is_an_error_of_the_run(sandbox: str) -> None:
    """Asking back for what the cell never made says so by name."""
    answer = await run(sandbox, "pass", get=("nothing_here",))
    assert answer.done["status"] == "error"
    assert "nothing_here" in json.dumps(answer.lines)


async def test_a_kernel_that_dies_is_said_to_have_died(sandbox: str) -> None:
    """The run ends with a typed failure, and the next run has a fresh kernel."""
    answer = await run(sandbox, "import os; os._exit(3)")
    assert answer.done["failure"]["code"] == "sandbox_died"
    said = (await run(sandbox, "print('again')")).text
    assert (
        said
        == "The remote kernel ended by itself with exit code 3. It was started again, without its variables.\nagain\n"
    )


async def test_a_link_in_place_of_values_is_not_followed(sandbox: str, tmp_path: Path) -> None:
    """A guest that puts a link where the host reads values gets nothing of what it points to."""
    (tmp_path / "secret").write_text("host secret")
    code = f"""
import warmcell_guest.values as values, os
values.dump = lambda names, path, last, **more: os.symlink({str(tmp_path / "secret")!r}, path)
"""
    await run(sandbox, code)
    answer = await run(sandbox, "x = 1", get=("x",))
    assert answer.done["failure"]["code"] == "protocol"
    assert "host secret" not in json.dumps(answer.lines)


async def test_a_caller_that_goes_away_interrupts_its_cell(keeper: KeeperClient, sandbox: str) -> None:
    """The next cell does not wait for the one that nobody listens to."""
    transport = httpx.AsyncHTTPTransport(uds=str(Paths.default().keeper_socket))
    url = f"http://k/warmcell/api/v1/sandboxes/{sandbox}/run"
    body = json.dumps({"code": "print('on', flush=True)\nimport time\ntime.sleep(300)"}) + "\n"
    async with (
        httpx.AsyncClient(transport=transport, timeout=60) as http,
        http.stream("POST", url, content=body.encode()) as response,
    ):
        async for line in response.aiter_lines():
            if "on" in line:
                break
    answer = await run(sandbox, "print('free')")
    assert answer.text == "free\n", (answer.lines, answer.done)


async def test_a_run_without_code_is_refused(sandbox: str) -> None:
    """The error says what a run needs."""
    transport = httpx.AsyncHTTPTransport(uds=str(Paths.default().keeper_socket))
    async with httpx.AsyncClient(transport=transport) as http:
        response = await http.post(f"http://k/warmcell/api/v1/sandboxes/{sandbox}/run", content=b'{"get": ["a b"]}\n')
    assert response.status_code == 400
    assert response.json()["code"] == "invalid_request"


async def test_values_are_put_once(sandbox: str, keeper: KeeperClient) -> None:
    """What is there is not written over; what was removed can be put again; large ones come whole."""
    transport = httpx.AsyncHTTPTransport(uds=str(Paths.default().keeper_socket))
    url = f"http://k/warmcell/api/v1/sandboxes/{sandbox}/values/1"
    async with httpx.AsyncClient(transport=transport, timeout=60) as http:
        assert (await http.put(url, content=b"content")).status_code == 204
        assert (await http.put(url, content=b"other")).json()["code"] == "protocol"
        assert (await http.delete(url)).status_code == 204
        large = bytes(range(256)) * 20_001
        assert (await http.put(url, content=large)).status_code == 204
    (there,) = Paths.default().runtime.rglob("values-1")
    assert there.read_bytes() == large
