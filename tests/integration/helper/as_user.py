"""What an ordinary user does with the helper, as a program: told on stdin in JSON, tells on stdout in JSON lines."""

import asyncio
import ctypes
import json
import os
import re
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends.bubblewrap import BubblewrapBackend, binary, helped
from warmcell.sandbox.backends.bubblewrap.plan import prepare
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.models import MIB, Limits, Mount, SandboxId, SandboxSpec, SnapshotId, Workspace
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.snapshots.carrying import CriuImages
from warmcell.sandbox.snapshots.criu import CriuEngine, SystemHelper

LIMITS = Limits(layer_bytes=64 * MIB, shm_bytes=16 * MIB, pids=256, memory_bytes=512 * MIB)
USER_NAMESPACE = 0x10000000 | 0x00020000


def say(what: object) -> None:
    """Print a line."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def spec(told: Mapping[str, Any]) -> SandboxSpec:
    """A small sandbox with the folders that were told."""
    workspace = told.get("workspace")
    return SandboxSpec(
        python=sys.executable,
        workspace=None if workspace is None else Workspace(path=workspace, mode=told.get("mode", "rw")),
        mounts=tuple(Mount(**one) for one in told.get("mounts", ())),
        limits=LIMITS,
    )


async def asked(told: Mapping[str, Any]) -> None:
    """Ask for sandboxes that are each described otherwise than a keeper would, and print what comes back."""
    paths = Paths.default().make()
    for case in told["cases"]:
        with tempfile.TemporaryDirectory() as directory:
            sandbox_id = SandboxId(secrets.token_hex(6))
            prepared = prepare(
                spec(told),
                sandbox_id=sandbox_id,
                directory=Path(directory),
                gpus=(),
                paths=paths,
                hidden=(),
                bwrap=binary.find().path,
            )
            request, fds = helped.described(prepared, spec(told), sandbox_id)
            try:
                change(request, fds, case)
                say(await answer(request, fds))
            finally:
                for fd in fds:
                    os.close(fd)


def change(request: dict[str, Any], fds: list[int], case: Mapping[str, Any]) -> None:
    """Make one thing of a request another one."""
    (workspace,) = (tree for tree in request["trees"] if tree["name"] == "workspace")
    workspace.update(case.get("tree", {}))
    if "open" in case:
        fds[workspace["fd"]] = os.open(case["open"], os.O_PATH | os.O_CLOEXEC)
    if case.get("mounts") == "own":
        fds[request["mounts"]] = own_mounts()
    elif "mounts" in case:
        fds[request["mounts"]] = os.open(case["mounts"], os.O_RDONLY | os.O_CLOEXEC)
    request.update(case.get("set", {}))


def own_mounts() -> int:
    """A mount namespace in a user namespace of this user's."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        made = ctypes.CDLL(None, use_errno=True).unshare(USER_NAMESPACE) == 0
        os.write(writing, b"." if made else b"!")
        signal.pause()
    try:
        assert os.read(reading, 1) == b"."
        return os.open(f"/proc/{child}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


async def answer(request: Mapping[str, Any], fds: list[int]) -> Any:
    """The first line that the helper answers."""
    connection = await SystemHelper().connect()
    import socket

    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], fds)
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    line = await asyncio.wait_for(reader.readline(), 60)
    writer.write_eof()
    await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return json.loads(line) if line else None


def with_upper(names: list[str]) -> None:
    """Ask for directories in the upper half of a workspace's overlay, which no keeper does."""
    described = helped.described

    def changed(*arguments: Any) -> tuple[dict[str, Any], list[int]]:
        request, fds = described(*arguments)
        for overlay in request["overlays"]:
            if overlay["name"] == "changes":
                overlay["skeleton"] = names
        return request, fds

    helped.described = changed


async def box(told: Mapping[str, Any]) -> None:
    """Make a sandbox, run scripts in it and print what comes of them; then wait, if told so."""
    with_upper(told.get("upper", []))
    paths = Paths.default().make()
    backend = BubblewrapBackend(paths=paths, helper=SystemHelper().connect)
    with tempfile.TemporaryDirectory(prefix="wc-") as directory:
        place = Path(directory) / "s"
        place.mkdir()
        instance = await backend.create(spec(told), sandbox_id=SandboxId(secrets.token_hex(6)), directory=place)
        channel = await GuestChannel.open(instance.run_directory, timeout=60)
        limits = {name: status.enforced for name, status in instance.limits.items()}
        say({"pid": instance.pid, "processes": list(instance.processes()), "limits": limits})
        for script in told.get("scripts", ()):
            result = await channel.exec(["sh", "-c", script], timeout=60)
            say({"code": result.exit_code, "out": result.stdout, "err": result.stderr})
        if told.get("wait"):
            ended = await instance.wait()
            say({"ended": ended.exit_code, "message": ended.message})
        await channel.close()
        await instance.stop()


async def connect(told: Mapping[str, Any]) -> None:
    """Open many connections, and say nothing on them."""
    held = [await SystemHelper().connect() for _ in range(int(sys.argv[2]))]
    say(len(held))
    await asyncio.sleep(60)


async def carried(told: Mapping[str, Any]) -> None:
    """Save a program, take its image out, and bring in that and one that was changed; print what is answered."""
    from tests.integration.snapshots.boxes import PROGRAM, nothing

    paths = Paths.default().make()
    engine = CriuEngine(paths=paths)
    images = CriuImages(engine)
    backend = BubblewrapBackend(paths=paths, helper=SystemHelper().connect)
    with tempfile.TemporaryDirectory(prefix="wc-") as directory:
        place = Path(directory) / "s"
        place.mkdir()
        instance = await backend.create(spec(told), sandbox_id=SandboxId(secrets.token_hex(6)), directory=place)
        channel = await GuestChannel.open(instance.run_directory, timeout=60)
        await engine.enroll(instance)
        program = PROGRAM.format(before="pass", each="pass", mib=1)
        script = 'cd / && setsid "$0" -c "$1" </dev/null >/dev/null 2>&1 & echo $!'
        pid = int((await channel.exec(["sh", "-c", script, sys.executable, program])).stdout)
        first = SnapshotId("first0000000")
        await engine.dump(instance, pid=pid, image=first, then="stop", while_frozen=nothing)
        stream = b"".join([piece async for piece in images.export_image(first)])
        await channel.close()
        await instance.stop()
    for number, content in enumerate((stream, resealed(stream))):
        brought = SnapshotId(f"brought{number:05}")
        try:
            await images.import_image(brought, _whole(content))
            say({"verified": await images.verify_image(brought)})
        except WarmcellError as error:
            say(error.to_json())
    for image in await engine.images():
        say(image.id)
        await engine.drop(image.id)


async def _whole(content: bytes) -> AsyncIterator[bytes]:
    yield content


def resealed(stream: bytes) -> bytes:
    """The same image, as somebody sends it who has not the helper's key."""
    return re.sub(rb'"seal": "[0-9a-f]{64}"', b'"seal": "' + b"0" * 64 + b'"', stream)


async def kernel(told: Mapping[str, Any]) -> None:
    """Have a keeper, a kernel in it, and suspend, resume, fork and restore that."""
    from tests.integration.helper.keeping import kernel_lives

    await kernel_lives(told, say)


async def written(told: Mapping[str, Any]) -> None:
    """Have a keeper with an umask, kernels from its template, and see what becomes of files that they make."""
    from tests.integration.helper.keeping import kernels_write

    await kernels_write(told, say)


async def agent(told: Mapping[str, Any]) -> None:
    """Have a kernel in a container, and kill what saves it."""
    from tests.integration.docker.agent_life import lives

    await lives(told, say)


if __name__ == "__main__":
    verbs = {each.__name__: each for each in (asked, box, connect, kernel, written, carried, agent)}
    asyncio.run(verbs[sys.argv[1]](json.load(sys.stdin)))
