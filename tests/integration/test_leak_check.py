"""The leak check itself: it must see what it is there to see."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import leaks
from tests.leaks import LeakError, own_places

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


def test_child_process_left_running_is_a_leak() -> None:
    """A child that the test did not end is named with its pid."""
    with pytest.raises(LeakError, match="left behind") as caught, own_places(grace_s=0.2):
        child = subprocess.Popen(SLEEPER, stdout=subprocess.PIPE)
    assert f"process {child.pid}" in str(caught.value)
    child.kill()
    child.communicate(timeout=60)


def test_detached_process_is_recognised_by_its_environment() -> None:
    """A grandchild in a session of its own, adopted by init, is found by the test's directory."""
    launcher = (
        "import subprocess, sys;"
        f"p = subprocess.Popen({SLEEPER!r}, start_new_session=True, stdout=-1, stderr=-3);"
        "p.stdout.readline(); print(p.pid, flush=True); import os; os._exit(0)"
    )
    with pytest.raises(LeakError) as caught, own_places(grace_s=0.2) as made:
        env = {**os.environ, **made.env}
        done = subprocess.run([sys.executable, "-c", launcher], env=env, capture_output=True, text=True, timeout=60)
        pid = int(done.stdout)
    os.kill(pid, 9)
    assert f"process {pid}" in str(caught.value)


def ends_later(env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A child of init's that ends a moment after its parent, which is returned, has."""
    later = "import os, time; os.fork() and os._exit(0); time.sleep(0.5)"
    child = subprocess.Popen([sys.executable, "-c", later], env={**os.environ, **env})
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return child


def test_process_that_ends_within_the_grace_is_no_leak() -> None:
    """What is on its way out is waited for."""
    with own_places(grace_s=10) as made:
        child = ends_later(made.env)
    child.wait(timeout=60)
    with pytest.raises(LeakError), own_places(grace_s=0) as made:
        child = ends_later(made.env)
    child.wait(timeout=60)


def test_file_in_the_runtime_directory_is_a_leak() -> None:
    """A socket or run directory that outlives its sandbox is named."""
    with pytest.raises(LeakError, match=r"r/s/abc"), own_places() as made:
        (made.runtime / "s" / "abc").mkdir(parents=True)


def test_held_lease_is_a_leak(tmp_path: Path) -> None:
    """A lock file may stay, a lock may not."""
    with pytest.raises(LeakError, match=r"GPU-1 \(held\)"), own_places() as made:
        file = (made.leases / "GPU-1").open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)
    file.close()
    with own_places() as made:
        (made.leases / "GPU-1").touch()


@pytest.mark.root
def test_mount_is_a_leak() -> None:
    """A mount below the test's directories is named."""
    with pytest.raises(LeakError, match="mount "), own_places(grace_s=0.2) as made:
        tried = subprocess.run(
            ["mount", "-t", "tmpfs", "tmpfs", made.state], capture_output=True, text=True, timeout=20
        )
        assert tried.returncode == 0, tried.stderr
        where = made.state
    subprocess.run(["umount", where], check=True, timeout=60)
    assert where.is_dir(), "what is mounted must not be emptied by the check"
    shutil.rmtree(where.parent)


@pytest.mark.root
def test_cgroup_is_a_leak() -> None:
    """An empty control group of ours is named."""
    group = leaks.GROUPS[0] / f"warmcell-test-{os.getpid()}"
    with pytest.raises(LeakError, match=group.name), own_places(grace_s=0.2):
        group.mkdir()
    group.rmdir()
