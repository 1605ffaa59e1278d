"""What somebody who wants out finds in a sandbox: the list of the threat model, as code."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.security.conftest import OF_THE_HOSTS_KERNEL
from warmcell.sandbox.testing.contract import Subject

pytestmark = pytest.mark.parametrize("subject", OF_THE_HOSTS_KERNEL, indirect=True)

PROBE = Path(__file__).with_name("probe.py").read_bytes()
ENVIRONMENT = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TMPDIR"}


FOUND: dict[str, dict[str, Any]] = {}
"""By backend: one look is enough for all that is asked of it."""


@pytest.fixture
async def found(subject: Subject) -> dict[str, Any]:
    """What the probe reports from a sandbox with default settings, and what it stands in."""
    name = subject.backend.name
    if name not in FOUND:
        async with subject.box() as box:
            said = await box.run(subject.python, "-I", "-", input=PROBE, timeout=60)
            assert said.exit_code == 0, said.stderr
            FOUND[name] = {**json.loads(said.stdout), "guest_run": box.instance.guest_run_directory, "backend": name}
    return FOUND[name]


async def test_it_has_no_capability_and_no_way_to_one(found: dict[str, Any]) -> None:
    """All five sets empty, no-new-privileges, a filter, not root and in no group."""
    assert {int(value, 16) for value in found["capabilities"].values()} == {0}
    assert (found["no_new_privs"], found["seccomp"]) == ("1", "2")
    assert found["uid"] != 0
    assert len(found["groups"]) <= 1
    for attempt in ("setuid", "chroot", "mknod", "priority", "set_user_id", "raw"):
        assert found[attempt] in ("EPERM", "EACCES", "EINVAL"), attempt


async def test_denied_system_calls_are_denied(found: dict[str, Any]) -> None:
    """Each by the filter itself: what the kernel would say to such arguments is something else."""
    outcomes = {name: code for name, code in found["syscalls"].items() if code not in ("EPERM", "ENOSYS")}
    assert not outcomes
    assert {found["syscalls"][name] for name in ("clone3", "openat2")} == {"ENOSYS"}


async def test_no_namespace_can_be_made(found: dict[str, Any]) -> None:
    """A user namespace would open much of the kernel."""
    assert set(found["unshare"].values()) == {"EPERM"}


async def test_only_usual_sockets_can_be_had(found: dict[str, Any]) -> None:
    """Above all no vsock: it knows no network namespace."""
    assert set(found["families"].values()) == {"EAFNOSUPPORT"}


async def test_its_namespaces_are_not_the_hosts(found: dict[str, Any]) -> None:
    """All but the time namespace, which nothing needs, and root's user namespace, which it leaves by its uid."""
    ours = {name: os.readlink(f"/proc/self/ns/{name}") for name in found["namespaces"]}
    shared = {name for name, value in found["namespaces"].items() if ours[name] == value}
    allowed = {"time", "time_for_children"} | ({"user"} if os.getuid() == 0 else set())
    assert shared <= allowed


async def test_nothing_of_the_kernel_can_be_written(found: dict[str, Any]) -> None:
    """No sysctl, no release agent, no memory of init, no file of the system."""
    writable = [path for path, code in found["writes"].items() if not code and path != "/proc/1/mem"]
    assert writable in ([], ["/proc/1/oom_score_adj"])
    # In a container, and with an ordinary user's sandboxes, init is a process of the guest's own user.
    own = os.getuid() != 0 or found["backend"] == "docker"
    assert found["writes"]["/proc/1/mem"] in ("EACCES", "EPERM") or own


async def test_nothing_private_of_the_host_can_be_read(found: dict[str, Any]) -> None:
    """Password hashes, host keys, engines' sockets, root's home."""
    readable = [path for path, code in found["reads"].items() if not code]
    assert not [path for path in readable if path not in ("/proc/keys", "/proc/1/environ")]
    assert not found["kernel_addresses"]


async def test_mounts_are_as_declared(found: dict[str, Any]) -> None:
    """What can be written is memory of its own or the environment's layer; nothing honours set-user-ID."""
    engine = found["backend"] == "docker"
    writable = {mount["at"]: mount["kind"] for mount in found["mounts"] if "rw" in mount["options"]}
    kinds = set(writable.values())
    assert kinds <= {"tmpfs", "overlay", "proc", "devpts", "devtmpfs"} | ({"mqueue"} if engine else set())
    assert {at for at, kind in writable.items() if kind == "devtmpfs"} <= {
        f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")
    }
    assert writable.get("/") is None
    # An engine's own are without, and no-new-privileges covers them; what the guest could put such a file on has it.
    assert all("nosuid" in mount["options"] for mount in found["mounts"] if not engine or mount["at"] in writable)
    of_the_kernel = {mount["kind"] for mount in found["mounts"]} & {"cgroup", "cgroup2", "securityfs", "debugfs"}
    assert of_the_kernel <= ({"cgroup", "cgroup2"} if engine else set())


async def test_the_only_socket_is_its_own(found: dict[str, Any]) -> None:
    """The one that the keeper speaks through."""
    assert found["sockets"] == [f"{found['guest_run']}/init.sock"]


async def test_the_devices_are_the_harmless_ones(found: dict[str, Any]) -> None:
    """No disk, no memory, no GPU that was not leased."""
    harmless = {"full", "null", "random", "tty", "urandom", "zero", "ptmx"}
    assert {Path(node).name for node in found["devices"]} <= harmless


async def test_no_address_is_reached(found: dict[str, Any]) -> None:
    """Not the cloud's metadata, not the local network, not the internet, not the host's resolver."""
    assert all(found["addresses"].values()), found["addresses"]


async def test_its_environment_is_the_allow_list(found: dict[str, Any]) -> None:
    """Nothing of the keeper's, which has tokens in its own."""
    assert set(found["environment"]) == ENVIRONMENT
    assert found["environment"]["HOME"].startswith("/home/")


async def test_it_sees_only_its_own_processes(found: dict[str, Any]) -> None:
    """The first few of its own pid namespace."""
    assert len(found["processes"]) <= 4
    assert max(found["processes"]) < 50


async def test_the_network_is_open_only_when_asked(subject: Subject) -> None:
    """The same probe, with the host's network: the loopback is shared, everything else stays."""
    async with subject.box(network="host") as box:
        said = await box.run(subject.python, "-I", "-", input=PROBE, timeout=60)
        found = json.loads(said.stdout)
    assert found["namespaces"]["net"] == os.readlink("/proc/self/ns/net")
    assert {int(value, 16) for value in found["capabilities"].values()} == {0}
    assert set(found["families"].values()) == {"EAFNOSUPPORT"}
    assert set(found["unshare"].values()) == {"EPERM"}
