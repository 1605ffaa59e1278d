"""Kernels over the keeper's REST: generations, ends, errors."""

import asyncio
import signal
from typing import Any

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient

from tests.integration.keeper.conftest import Configure, KernelBody, until
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import InvalidRequestError, NotFoundError, SandboxDiedError


async def run(body: dict[str, Any], code: str) -> str:
    """What a cell prints, asked through the proxy as any Jupyter client asks."""
    client = AsyncKernelClient()
    client.load_connection_info({**body["connection"], "key": body["connection"]["key"].encode()})
    client.start_channels(hb=False)
    try:
        await client.wait_for_ready(timeout=60)
        said: list[str] = []
        await client.execute_interactive(
            code, timeout=60, output_hook=lambda message: said.append(message["content"].get("text", ""))
        )
        return "".join(said).strip()
    finally:
        client.stop_channels()


async def test_a_kernel_answers_and_says_how_it_was_started(keeper: KeeperClient, kernel_body: KernelBody) -> None:
    """POST returns once it has answered, with where it came from and in how many ms."""
    body = kernel_body()
    info = await keeper.post("/kernels", body)
    assert (info["state"], info["started_from"], info["kernel_id"]) == ("running", "cold", body["kernel_id"])
    assert 0 < info["started_ms"] < 60_000
    assert info["isolated"] is False
    assert await run(body, "print(6 * 7)") == "42"


async def test_a_restart_comes_from_the_template(keeper: KeeperClient, kernel_body: KernelBody, spec: Any) -> None:
    """Once the fork server is ready the next generation is a fork with the module imported, in the same sandbox."""
    body = kernel_body(spec={**spec, "preload": ["colorsys"]})
    first = await keeper.post("/kernels", body)
    assert await run(body, "x = 1; import sys; print('colorsys' in sys.modules)") == "False"

    async def ready() -> bool:
        return (await keeper.get(f"/sandboxes/{first['id']}"))["template"]["state"] == "ready"

    await until(ready)
    await keeper.post(f"/kernels/{body['kernel_id']}/end", {"grace_s": 0})
    second = await keeper.post("/kernels", body)
    assert (second["id"], second["started_from"], second["generation"]) == (first["id"], "template", 2)
    assert await run(body, "print('colorsys' in sys.modules if 'sys' in globals() else 'fresh')") == "fresh"
    assert await run(body, "import sys; print('colorsys' in sys.modules, 'x' in globals())") == "True False"


async def test_a_prepared_sandbox_serves_the_next_first_start(
    configure: Configure, kernel_body: KernelBody, spec: Any
) -> None:
    """With a pool, the second kernel of the same shape starts from the template at once."""
    configure(backend="process", keeper_idle_s=0.2, prepared=1)
    async with await KeeperClient.connect() as client:

        async def prepared() -> bool:
            return any(one["prepared"] for one in (await client.get("/templates"))["templates"])

        first = kernel_body(spec={**spec, "preload": ["colorsys"]})
        assert (await client.post("/kernels", first))["started_from"] == "cold"
        await until(prepared)
        second = kernel_body(spec={**spec, "preload": ["colorsys"]})
        info = await client.post("/kernels", second)
        assert info["started_from"] == "template"
        assert await run(second, "import sys; print('colorsys' in sys.modules)") == "True"
        for body in (first, second):
            await client.delete(f"/kernels/{body['kernel_id']}")


async def test_other_settings_make_another_sandbox_for_the_same_kernel(
    keeper: KeeperClient, kernel_body: KernelBody, spec: Any
) -> None:
    """A restart whose shape changed moves the kernel; the old sandbox is gone."""
    body = kernel_body()
    first = await keeper.post("/kernels", body)
    await keeper.post(f"/kernels/{body['kernel_id']}/end", {"grace_s": 0})
    body["spec"] = {**spec, "limits": {"memory_bytes": 2**30}}
    second = await keeper.post("/kernels", body)
    assert second["id"] != first["id"]
    assert [one["id"] for one in (await keeper.get("/sandboxes"))["sandboxes"]] == [second["id"]]
    assert await run(body, "print('moved')") == "moved"


async def test_wait_answers_when_the_kernel_is_dead_and_says_with_what(
    keeper: KeeperClient, kernel_body: KernelBody
) -> None:
    """A kernel killed from outside is known dead, its exit code told, its sandbox says why."""
    body = kernel_body()
    info = await keeper.post("/kernels", body)
    waiting = asyncio.create_task(keeper.get(f"/kernels/{body['kernel_id']}?wait=30"))
    assert await run(body, "print('alive')") == "alive"
    assert not waiting.done()
    client = AsyncKernelClient()
    client.load_connection_info({**body["connection"], "key": b"secret"})
    client.start_channels(hb=False)
    client.execute("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    dead = await waiting
    client.stop_channels()
    assert (dead["alive"], dead["exit_code"]) == (False, 128 + signal.SIGSEGV)

    async def told() -> bool:
        return (await keeper.get(f"/sandboxes/{info['id']}"))["error"] is not None

    await until(told)
    error = (await keeper.get(f"/sandboxes/{info['id']}"))["error"]
    assert error["code"] == "sandbox_died"
    assert "SIGSEGV" in error["message"]


async def test_removing_twice_is_as_good_as_once(keeper: KeeperClient, kernel_body: KernelBody) -> None:
    """DELETE is idempotent, and the kernel is not there afterwards."""
    body = kernel_body()
    await keeper.post("/kernels", body)
    for _ in range(2):
        await keeper.delete(f"/kernels/{body['kernel_id']}")
    with pytest.raises(NotFoundError):
        await keeper.get(f"/kernels/{body['kernel_id']}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"connection": {}}, "connection"),
        ({"spec": {"python": "/no/such/python"}}, "/no/such/python is no Python interpreter"),
        ({"spec": {"python": "python"}, "colour": "red"}, "no field 'colour'"),
    ],
)
async def test_bad_requests_get_one_error_with_the_cure(
    keeper: KeeperClient, kernel_body: KernelBody, change: dict[str, Any], says: str
) -> None:
    """Nothing is started, and the hint says what to give."""
    with pytest.raises(InvalidRequestError) as caught:
        await keeper.post("/kernels", kernel_body(**change))
    assert says in str(caught.value)
    assert caught.value.hint
    assert (await keeper.get("/kernels"))["kernels"] == []


async def test_a_failed_start_stays_visible_with_its_reason(
    keeper: KeeperClient, kernel_body: KernelBody, spec: Any
) -> None:
    """The page can find the failed sandbox by the kernel's id."""
    body = kernel_body(spec={**spec, "workspace": {"path": "/no/such/folder"}})
    with pytest.raises(InvalidRequestError):
        await keeper.post("/kernels", body)
    failed = [one for one in (await keeper.get("/sandboxes"))["sandboxes"] if one["kernel_id"] == body["kernel_id"]]
    assert [one["state"] for one in failed] == ["failed"]
    assert "/no/such/folder" in failed[0]["error"]["message"]


async def test_an_interpreter_without_a_kernel_is_named(
    keeper: KeeperClient, kernel_body: KernelBody, spec: Any, tmp_path: Any
) -> None:
    """A Python that has no ipykernel gives one error that says so."""
    import subprocess
    import sys

    await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True
    )
    with pytest.raises((SandboxDiedError, Exception), match="ipykernel"):
        await keeper.post("/kernels", kernel_body(spec={**spec, "python": str(tmp_path / "bare/bin/python")}))


async def test_a_kernel_that_was_short_lived_still_leaves_a_prepared_sandbox(
    configure: Configure, kernel_body: KernelBody, spec: Any
) -> None:
    """Deleted before its template was imported, its shape is still one that is in use."""
    configure(backend="process", keeper_idle_s=0.2, prepared=1)
    async with await KeeperClient.connect() as client:
        body = kernel_body(spec={**spec, "preload": ["colorsys"]})
        await client.post("/kernels", body)
        await client.delete(f"/kernels/{body['kernel_id']}")

        async def prepared() -> bool:
            return any(one["prepared"] for one in (await client.get("/templates"))["templates"])

        await until(prepared)
