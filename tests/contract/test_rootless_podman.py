"""The contract with an engine that is an ordinary user's own: Podman without root, asked by that user."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import OrdinaryUser
from tests.contract.test_backends import NOT_PODMANS, PYTHON
from tests.engines import FILES_MOST, IMAGE, START_TIMEOUT_S, answers, base_image
from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.testing.contract import CHECKS

pytestmark = [pytest.mark.podman, pytest.mark.user]

NAME = "wcuser"
OTHERS = "100000:65536"
"""What it may have of other users' numbers."""
OF_THE_USERS = (
    "everything of a sandboxs own is there again",
    "the guest is not root",
    "the guest has no capabilities and can gain none",
    "only its own processes are in sight",
    "without network no port of the host is reached",
    "a writable workspace is at its own path",
    "a home is the guests own",
    "a limit that is not enforced says why",
    "the guest has namespaces of its own",
)
"""What may be otherwise where a container's users are not the host's; the long form tries all."""
SERVE = """
mount -t overlay -o lowerdir="$1/etc:/etc" overlay /etc
exec setpriv --reuid "$2" --regid "$2" --clear-groups --inh-caps=-all env -i PATH="$PATH" HOME="$1/home" \\
  XDG_RUNTIME_DIR="$1/run" TMPDIR="$1/tmp" CONTAINERS_CONF="$1/etc/conf" \\
  podman --cgroup-manager cgroupfs --log-level error system service --time 0 "unix://$1/run/sock"
"""
TIMEOUT_S = 600


@pytest.fixture
def engine(ordinary_user: OrdinaryUser) -> Iterator[Engine]:
    """The user's own, with the test image. Who the user is and may be, its mount namespace alone says."""
    archive, uid = base_image(), ordinary_user.uid
    directory = Path(tempfile.mkdtemp(prefix="wd-", dir="/tmp"))
    options = f"size={FILES_MOST},mode=0700,uid={uid},gid={uid}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=True, timeout=10)
    for name in ("home", "run", "tmp"):
        (directory / name).mkdir(mode=0o700)
        os.chown(directory / name, uid, uid)
    etc = directory / "etc"
    etc.mkdir(mode=0o755)
    (etc / "passwd").write_text(f"root:x:0:0::/root:/bin/sh\n{NAME}:x:{uid}:{uid}::{directory}/home:/bin/sh\n")
    (etc / "group").write_text(f"root:x:0:\n{NAME}:x:{uid}:\n")
    for name in ("subuid", "subgid"):
        (etc / name).write_text(f"{NAME}:{OTHERS}\n")
    (etc / "conf").write_text('[engine]\nlock_type = "file"\nevents_logger = "none"\n')
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "slave", "bash", "-euc", SERVE, "serve", directory, str(uid)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
        )
    made = Engine(f"unix://{directory}/run/sock")
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(made):
            assert time.monotonic() < deadline, (directory / "log").read_text(errors="replace")[-4000:]
            time.sleep(0.05)
        with made.client(timeout_s=START_TIMEOUT_S) as client:
            client.import_image(str(archive), repository=IMAGE)
        yield made
    finally:
        process.terminate()
        process.wait(START_TIMEOUT_S)
        for file in directory.glob("run/**/pause.pid"):  # What holds the user's namespace.
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), 9)
        subprocess.run(["umount", "--lazy", directory], check=True, timeout=10)
        shutil.rmtree(directory)


@pytest.mark.parametrize(
    "wanted", [OF_THE_USERS, pytest.param(("",), marks=pytest.mark.long)], ids=["what differs", "all"]
)
@pytest.mark.timeout(TIMEOUT_S + 60)
async def test_podman_without_root_keeps_its_promises(
    ordinary_user: OrdinaryUser, engine: Engine, wanted: tuple[str, ...]
) -> None:
    """The guest is the user, on the host too, so that folders are writable and files can be saved; limits that the
    engine leaves out are told as not enforced.
    """
    info = await asyncio.to_thread(engine.info)
    assert (info.rootless, info.keeps_user) == (True, True)
    process = await asyncio.create_subprocess_exec(
        *ordinary_user.argv(sys.executable, "-m", "warmcell.sandbox.testing.contract", "docker"),
        *("--python", PYTHON, "--image", IMAGE),
        *(word for part in wanted for word in ("--only", part)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**ordinary_user.env, "DOCKER_HOST": engine.address},
        cwd="/",
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    results = [json.loads(line) for line in stdout.splitlines()]
    tried = {result["check"] for result in results}
    assert tried == {*wanted} if wanted == OF_THE_USERS else len(tried) >= 60, stderr.decode()
    broken = {result["check"]: result["why"] for result in results if not result["ok"]}
    # Where control groups are of version 1, Podman gives no namespace of them.
    assert broken.pop(NOT_PODMANS, "cgroup").count("cgroup")
    assert not broken


def test_what_it_is_held_to_is_in_the_suite() -> None:
    """A check that is renamed is not lost."""
    assert {check.name for check in CHECKS}.issuperset(OF_THE_USERS)
