"""Control groups that an ordinary user's service manager makes.

Who logs in over ssh is in a session of root's, out of which no process can be moved by its user. The manager can: it
puts what `systemd-run --scope` starts into a group of the user's own.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from warmcell.sandbox.backends.cgroups.group import Cgroup, words


class Scope(Cgroup):
    """A group that comes to be when its first process is started by `prefix`."""

    def __init__(self, name: str, limits: Mapping[str, float | None]) -> None:
        super().__init__({}, 2)
        self._controllers = tuple(limits)
        set_to = [word for limit, value in limits.items() if value is not None for word in _properties(limit, value)]
        if version() >= 253:  # By default the manager would end the whole scope when one process is short of memory.
            set_to.append("--property=OOMPolicy=continue")
        self.prefix = (
            *("systemd-run", "--user", "--scope", "--quiet", "--collect", "--no-ask-password"),
            *(f"--unit={name}.scope", *set_to, "--"),
        )
        self.env = environment()

    def started(self, pid: int) -> None:
        """Find out which group it has become."""
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                directory = mount_point() / group.lstrip("/")
                self._directories = dict.fromkeys(self._controllers, directory)

    def remove_now(self) -> bool:
        """The manager removes it once nobody is in it; until then members are killed."""
        if all(not directory.exists() for directory in self.directories):
            return True
        self.kill()
        return False


def available(uid: int) -> tuple[Path | None, list[str]]:
    """Where the manager of this user makes groups, and the controllers that it has been given. Blocks."""
    if shutil.which("systemd-run") is None or not Path(f"/run/user/{uid}/systemd/private").exists():
        return None, []
    manager = mount_point() / f"user.slice/user-{uid}.slice/user@{uid}.service"
    return manager / "app.slice", words(manager / "cgroup.controllers")


@cache
def version() -> int:
    """The version of systemd, 0 where it cannot be told. Blocks once."""
    try:
        said = subprocess.run(["systemd-run", "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return 0
    match = re.match(r"systemd (\d+)", said.stdout)
    return int(match[1]) if match else 0


def environment() -> Mapping[str, str]:
    """What `systemd-run --user` needs to find the manager."""
    runtime = f"/run/user/{os.getuid()}"
    return {
        "PATH": os.defpath,
        "XDG_RUNTIME_DIR": runtime,
        "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus",
    }


def mount_point() -> Path:
    """Where systemd mounts version 2."""
    unified = Path("/sys/fs/cgroup/unified")
    return unified if unified.is_dir() else Path("/sys/fs/cgroup")


def _properties(limit: str, value: float) -> list[str]:
    if limit == "memory":
        return [f"--property=MemoryMax={int(value)}", "--property=MemorySwapMax=0"]
    if limit == "pids":
        return [f"--property=TasksMax={int(value)}"]
    return [f"--property=CPUQuota={max(1, round(100 * value))}%"]
