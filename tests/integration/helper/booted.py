"""A machine that systemd has booted, for a test: its own processes, mounts and control groups on files of this one."""

import contextlib
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.helper.system import NOTIFY, START_TIMEOUT_S
from tests.leaks import Places

SYSTEMD = Path("/lib/systemd/systemd")
GROUPS = Path("/sys/fs/cgroup")
HIERARCHIES = ("systemd", "cpu", "memory", "pids")
"""systemd's own, and those that the helper's unit asks for."""

ENTER = """
set -e
for each in {hierarchies}; do echo $$ > {groups}/$each/{name}/cgroup.procs; done
exec unshare --cgroup --pid --fork --mount --uts --ipc --kill-child sh -ec "$0"
"""

# Settings of the kernel are those of this machine, so it may not change any.
BOOT = """
mount --make-rprivate /
mount -t tmpfs tmpfs {work}
mkdir {work}/up {work}/work {work}/root
mount -t overlay overlay -o lowerdir=/,upperdir={work}/up,workdir={work}/work {work}/root
cd {work}/root
mount -t proc proc proc
for each in fs net vm; do mount --bind proc/sys/$each proc/sys/$each; mount -o remount,bind,ro proc/sys/$each; done
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs sys/fs/cgroup
for each in {hierarchies}; do mkdir sys/fs/cgroup/$each; done
mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
for each in {controllers}; do mount -t cgroup -o $each cgroup sys/fs/cgroup/$each; done
mkdir run/outside
mount --bind {outside} run/outside
ln -s /dev/null etc/systemd/system/systemd-sysctl.service
printf '[Unit]\\nDefaultDependencies=no\\n' > etc/systemd/system/warmcell-test.target
mkdir before
pivot_root . before
cd /
umount -l before
exec chroot . {systemd} --system --unit=warmcell-test.target --log-target=null --crash-reboot=no
"""


class Booted:
    """A system that is up."""

    def __init__(self, process: subprocess.Popen[bytes], outside: Path) -> None:
        self._process = process
        self.outside = outside
        """Its /run/outside."""
        self._enter = ["nsenter", "-t", _children(process.pid)[0], "-p", "-m", "-r", "-u", "-i", "-C"]

    def run(self, *argv: str, check: bool = True) -> str:
        """What a command of root's says in it."""
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        done = subprocess.run([*self._enter, *argv], capture_output=True, text=True, env=env, cwd="/", timeout=120)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def write(self, unit: str, text: str) -> None:
        """Put a unit into it."""
        (self.outside / unit).write_text(text)
        self.run("cp", f"/run/outside/{unit}", f"/etc/systemd/system/{unit}")
        self.run("systemctl", "daemon-reload")

    def shut_down(self) -> None:
        """Stop all that runs, in the order that its units ask for, and wait for the end."""
        self.run("systemctl", "exit", check=False)
        self._process.wait(120)


@contextlib.contextmanager
def booted(places: Places) -> Iterator[Booted]:
    """Skips where this machine cannot have one."""
    name = f"warmcell-test-{os.getpid()}"
    groups = [GROUPS / each / name for each in HIERARCHIES]
    if not SYSTEMD.exists() or shutil.which("systemctl") is None:
        pytest.skip("systemd is not installed")
    if not all(each.parent.is_dir() for each in groups):
        pytest.skip("there are no control groups in which systemd could run")
    work, outside = places.root / "boot", places.root / "outside"
    for each in (*groups, work, outside):
        each.mkdir()
    known = {"hierarchies": " ".join(HIERARCHIES), "controllers": " ".join(HIERARCHIES[1:])}
    boot = BOOT.format(work=work, outside=outside, systemd=SYSTEMD, **known)
    enter = ENTER.format(groups=GROUPS, name=name, **known)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard, (places.root / "boot.log").open("ab") as log:
        heard.bind(f"\0{name}")
        heard.settimeout(START_TIMEOUT_S)
        env = {"PATH": os.environ["PATH"], "container": "warmcell", NOTIFY: f"@{name}"}
        process = subprocess.Popen(["sh", "-c", enter, boot], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while b"READY=1" not in heard.recv(4096):
                pass
            yield Booted(process, outside)
        except TimeoutError:
            raise AssertionError((places.root / "boot.log").read_text()) from None
        finally:
            _end(process)
            for top in groups:
                _remove(top)


def _end(process: subprocess.Popen[bytes]) -> None:
    """And with it all that it has booted: the first process of a pid namespace ends as the last."""
    first = [int(pid) for pid in _children(process.pid)]
    handles = []
    for pid in first:
        with contextlib.suppress(ProcessLookupError):
            handles.append(os.pidfd_open(pid))
    process.kill()
    process.wait()
    for handle in handles:
        select.select([handle], [], [], START_TIMEOUT_S)
        os.close(handle)


def _children(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return []


def _remove(group: Path) -> None:
    """A control group goes once the last of its processes is reaped, which is a moment after their end."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while group.exists() and time.monotonic() < deadline:
        for below, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(below)
