"""Engines of containers that belong to a run of the tests: with files, a socket and images of their own."""

import contextlib
import gc
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lanes import TOP
from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.backends.docker.labels import SANDBOX
from warmcell.sandbox.errors import WarmcellError

IMAGE = "warmcell-test:base"
PYTHON = "/usr/bin/python3"
"""In that image."""
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 30.0
BASE_TIMEOUT_S = 300.0
FILES_MOST = "8g"
"""Of all images and containers; what is not used takes nothing."""


def base_image() -> Path:
    """The archive of a small Debian with Python and ipykernel; made where it is not there yet, in half a minute."""
    made = subprocess.run(
        [TOP / "scripts" / "base-image"], capture_output=True, text=True, timeout=BASE_TIMEOUT_S, check=False
    )
    assert made.returncode == 0, made.stderr
    return Path(made.stdout.strip())


class Dockerd:
    """A Docker engine. It can be killed, and started again with all it had."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host = f"unix://{directory}/sock"
        self.engine = Engine(self.host)

    def start(self, *, live_restore: bool = False) -> None:
        """Start it, and wait until it answers; `live_restore`: with it containers stay that the last one has left."""
        # What was killed has left them. The second is taken for a process that lives, as long as nobody has reaped it.
        for left in ("pid", "x/containerd/containerd.pid", "sock"):
            (self.directory / left).unlink(missing_ok=True)
        with (self.directory / "log").open("ab") as log:
            # It is nobody's child, and has nothing of the test's that happens to start it.
            subprocess.run(
                [
                    *("setsid", "--fork", "dockerd"),
                    *("--data-root", self.directory / "data", "--exec-root", self.directory / "x"),
                    *("--pidfile", self.directory / "pid", "--host", self.host),
                    *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
                    *("--bridge=none", "--log-level", "error"),
                    *(["--live-restore"] if live_restore else []),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"]},
                check=True,
                timeout=START_TIMEOUT_S,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(self.engine):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    @property
    def live_restore(self) -> bool:
        """Whether containers stay when it is started again."""
        return self.engine.info(fresh=True).live_restore

    @property
    def runs(self) -> bool:
        """Whether it answers."""
        return answers(self.engine)

    def kill(self) -> None:
        """As if it had crashed: containers run on."""
        assert self._signal(signal.SIGKILL), "it does not end"

    def end_unstarted(self) -> None:
        """End what it had made of a container when it was killed, and has forgotten: it waits for ever to start."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if words[:2] != [b"runc", b"init"]:
                    continue
                shim = Path("/proc", (entry / "stat").read_text().rpartition(")")[2].split()[1])
                if bytes(self.directory) in (shim / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
                    os.kill(int(shim.name), signal.SIGKILL)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """As if it waited for a disk: it listens, and answers nobody."""
        process = os.pidfd_open(int((self.directory / "pid").read_text()))
        try:
            signal.pidfd_send_signal(process, signal.SIGSTOP)
            yield
        finally:
            signal.pidfd_send_signal(process, signal.SIGCONT)
            os.close(process)

    def stop(self) -> None:
        """Have it end its containers and itself."""
        if not self._signal(signal.SIGTERM):
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> bool:
        """Whether it has ended by that within a while."""
        try:
            process = os.pidfd_open(int((self.directory / "pid").read_text()))
        except (OSError, ValueError):
            return True
        try:
            signal.pidfd_send_signal(process, number)
            return bool(select.select([process], [], [], END_TIMEOUT_S)[0])
        except ProcessLookupError:
            return True
        finally:
            os.close(process)

    def docker(self, *arguments: str) -> str:
        """What docker's own command prints."""
        said = subprocess.run(
            ["docker", "--host", self.host, *arguments], capture_output=True, text=True, timeout=120, check=False
        )
        assert said.returncode == 0, said.stderr
        return said.stdout.strip()

    def log(self) -> str:
        """The end of what it has logged."""
        return (self.directory / "log").read_text(errors="replace")[-4000:]


def answers(engine: Engine) -> bool:
    """Whether there is one."""
    with contextlib.suppress(WarmcellError):
        engine.info(fresh=True)
        return True
    return False


@contextlib.contextmanager
def own_engine() -> Iterator[Dockerd]:
    """A Docker engine of one's own, with the test image."""
    archive = base_image()
    directory = Path(tempfile.mkdtemp(prefix="wd-", dir="/tmp"))
    # In memory: a disk takes longer to give the files back than all tests together take.
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FILES_MOST}", "tmpfs", directory], check=True, timeout=10)
    made = Dockerd(directory)
    try:
        made.start()
        made.docker("import", str(archive), IMAGE)
        yield made
    finally:
        made.stop()
        _remove(directory)


@pytest.fixture(scope="session")
def dockerd() -> Iterator[Dockerd]:
    """A Docker engine for all tests of a run."""
    with own_engine() as made:
        yield made


@pytest.fixture
def docker(dockerd: Dockerd) -> Iterator[Dockerd]:
    """The engine, on which a test may leave no container."""
    yield dockerd
    _none_left(dockerd.engine)


def _none_left(engine: Engine) -> None:
    found = engine.labelled(SANDBOX)
    for one in found:
        engine.remove(one.id)
    assert not found, f"containers are left: {[f'{one.id[:12]} {dict(one.labels)}' for one in found]}"


@pytest.fixture(scope="session")
def podmand() -> Iterator[Engine]:
    """Podman's service for all tests of a run, with the test image, and files and a socket of its own."""
    archive = base_image()
    directory = Path(tempfile.mkdtemp(prefix="wd-", dir="/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FILES_MOST}", "tmpfs", directory], check=True, timeout=10)
    # Else its locks are the machine's.
    (directory / "conf").write_text('[engine]\nlock_type = "file"\nevents_logger = "none"\n')
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(
            [
                *("podman", "--root", directory / "data", "--runroot", directory / "x", "--tmpdir", directory / "t"),
                *("--cgroup-manager", "cgroupfs", "--log-level", "error"),
                *("system", "service", "--time", "0", f"unix://{directory}/sock"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"PATH": os.environ["PATH"], "HOME": str(directory), "CONTAINERS_CONF": str(directory / "conf")},
            cwd=directory,  # There it notes down who was killed for memory.
        )
    engine = Engine(f"unix://{directory}/sock")
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(engine):
            assert time.monotonic() < deadline, (directory / "log").read_text(errors="replace")[-4000:]
            time.sleep(0.05)
        with engine.client(timeout_s=END_TIMEOUT_S) as client:
            client.import_image(str(archive), repository=IMAGE)
        yield engine
    finally:
        process.terminate()
        process.wait(END_TIMEOUT_S)
        _remove(directory)
        for top in {*Path("/sys/fs/cgroup").glob("libpod_parent"), *Path("/sys/fs/cgroup").glob("*/libpod_parent")}:
            for group, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):  # Somebody else has a Podman as well.
                    os.rmdir(group)


@pytest.fixture
def podman(podmand: Engine) -> Iterator[Engine]:
    """Podman's service, on which a test may leave no container."""
    yield podmand
    _none_left(podmand)


@pytest.fixture
def mortal(docker: Dockerd) -> Iterator[Dockerd]:
    """The engine, which a test may kill; it is up again afterwards, as it always is."""
    yield docker
    if not docker.runs or docker.live_restore:
        docker.stop()
        docker.start()
    gc.collect()  # docker-py leaves the socket of a connection that was refused to it.


def _remove(directory: Path) -> None:
    """What an engine that was killed has left running, what it leaves mounted, then its files."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"containerd-shim" in (said := file.read_bytes()) and f"{directory}/".encode() in said:
                os.kill(int(file.parent.name), signal.SIGKILL)
    for line in Path("/proc/self/mountinfo").read_text().splitlines()[::-1]:
        place = line.split()[4]
        if place == str(directory) or place.startswith(f"{directory}/"):
            subprocess.run(["umount", "--lazy", place], check=False, timeout=10)
    shutil.rmtree(directory, ignore_errors=True)
