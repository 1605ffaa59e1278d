"""What a sandbox has of the host: what it was given."""

import asyncio
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.bubblewrap.boxes import folder
from tests.leaks import Places
from tests.security.conftest import OF_THE_HOSTS_KERNEL, writable_folder
from warmcell.sandbox.models import Mount
from warmcell.sandbox.testing.contract import Subject

SEARCH = """
import os, sys
found = []
for top, names, files in os.walk("/", onerror=lambda error: None):
    names[:] = [name for name in names if os.path.join(top, name) not in ("/proc", "/sys")]
    found += [os.path.join(top, name) for name in files if sys.argv[1] in name]
print("\\n".join(found))
"""
CONNECT = """
import socket, sys
try: socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3)
except OSError as error: print(type(error).__name__)
else: print("reached")
"""


@pytest.fixture
def marker(places: Places) -> Iterator[Path]:
    """A file in the home of whoever runs the tests."""
    home = Path.home()
    if not os.access(home, os.W_OK):
        home = folder(places, "home")
    path = home / f"marker-{secrets.token_hex(8)}"
    path.write_text("secret")
    path.chmod(0o644)
    yield path
    path.unlink()


@pytest.mark.parametrize("subject", OF_THE_HOSTS_KERNEL, indirect=True)  # A walk takes 10 s in another one.
async def test_a_file_in_the_hosts_home_is_not_there(subject: Subject, marker: Path) -> None:
    """Neither at its path nor anywhere else, although anybody on the host may read it."""
    async with subject.box(workspace=writable_folder(subject, "work")) as box:
        assert (await box.shell(f"cat {marker}")).exit_code != 0
        found = await box.run(subject.python, "-c", SEARCH, marker.name)
        assert (found.stdout.strip(), found.exit_code) == ("", 0)


async def test_it_is_not_reached_through_a_link_in_the_workspace(subject: Subject, marker: Path) -> None:
    """Links are followed inside, where they lead nowhere."""
    work = writable_folder(subject, "work")
    (work / "link").symlink_to(marker)
    (work / "root").symlink_to("/")
    async with subject.box(workspace=work) as box:
        assert (await box.shell(f"cat {work}/link")).exit_code != 0
        assert (await box.shell(f"cat {work}/root{marker}")).exit_code != 0
        assert (await box.shell(f"cat {work}/../../../../{marker}")).exit_code != 0


@pytest.mark.parametrize("subject", OF_THE_HOSTS_KERNEL, indirect=True)  # A walk takes 10 s in another one.
async def test_nothing_is_written_to_the_host_but_in_the_workspace(subject: Subject) -> None:
    """A name is left wherever it can be; on the host it is in one place."""
    work, name = writable_folder(subject, "work"), f"trace-{secrets.token_hex(8)}"
    script = f"for place in / /tmp /var/tmp /dev/shm /run/warmcell ~ /usr /etc {work}; do echo x > $place/{name}; done"
    async with subject.box(workspace=work) as box:
        await box.shell(script)
        written = (await box.run(subject.python, "-c", SEARCH, name)).stdout.split()
        assert f"{work}/{name}" in written
        assert len(written) >= 4
    places_on_host = (
        Path("/"),
        Path("/tmp"),
        Path("/var/tmp"),
        Path("/dev/shm"),
        Path.home(),
        Path("/usr"),
        Path("/etc"),
    )
    assert not [place for place in places_on_host if (place / name).exists()]
    assert (work / name).exists()


async def test_a_listening_port_of_the_host_is_not_reached(subject: Subject) -> None:
    """By any of its addresses."""
    async with await asyncio.start_server(lambda reader, writer: writer.close(), "0.0.0.0", 0) as server:
        port = str(server.sockets[0].getsockname()[1])
        addresses = ["127.0.0.1", "0.0.0.0", *await _own_addresses()]
        async with subject.box() as box:
            for address in addresses:
                said = await box.run(subject.python, "-c", CONNECT, address, port)
                assert said.stdout.strip() not in ("", "reached"), address


async def test_tokens_in_the_keepers_environment_stay_there(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is handed on, by no process of the sandbox."""
    token = secrets.token_hex(16)
    monkeypatch.setenv("JUPYTER_TOKEN", token)
    async with subject.box() as box:
        everything = await box.says("env; cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'")
        assert token not in everything
        assert "JUPYTER" not in everything
        for pid in box.instance.processes()[1:]:
            assert token not in Path(f"/proc/{pid}/environ").read_text(errors="replace")


async def test_the_keepers_socket_is_not_reached(subject: Subject, places: Places) -> None:
    """Not even where the whole of its directories' parent is the workspace."""
    server = await asyncio.start_unix_server(lambda reader, writer: writer.close(), places.runtime / "keeper.sock")
    places.root.chmod(0o755)
    try:
        code = f"import socket; socket.socket(socket.AF_UNIX).connect({str(places.runtime / 'keeper.sock')!r})"
        async with subject.box(workspace=places.root) as box:
            assert (await box.run(subject.python, "-c", code)).exit_code != 0
        async with subject.box(mounts=(Mount(source=str(places.root), mode="rw"),)) as box:
            assert (await box.run(subject.python, "-c", code)).exit_code != 0
    finally:
        server.close()
        await server.wait_closed()
        (places.runtime / "keeper.sock").unlink(missing_ok=True)


async def _own_addresses() -> list[str]:
    """Addresses of this machine other than the loopback."""
    process = await asyncio.create_subprocess_exec("hostname", "-I", stdout=asyncio.subprocess.PIPE)
    stdout, _ = await process.communicate()
    return [address for address in stdout.decode().split() if ":" not in address]
