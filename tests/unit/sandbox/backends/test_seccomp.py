"""The system call filter, run by a small interpreter of classic BPF."""

import errno
import platform
import socket
import stat
import struct
from collections.abc import Sequence

import pytest

from warmcell.sandbox.backends import seccomp
from warmcell.sandbox.errors import BackendUnavailableError

MACHINES = tuple(seccomp.AUDIT_ARCH)
SETTING_A_MODE = [
    *(("chmod", 1), ("fchmod", 1), ("fchmodat", 2), ("fchmodat2", 2), ("creat", 1)),
    *(("mknod", 1), ("mknodat", 2), ("mkdir", 1), ("mkdirat", 2)),
]
"""Calls with a mode, and which argument it is."""
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def decide(program: bytes, arch: int, call: int, arguments: Sequence[int] = ()) -> int:
    """What the kernel would do with a system call."""
    data = struct.pack("<IIQ6Q", call, arch, 0, *(*arguments, *[0] * (6 - len(arguments))))
    steps = [struct.unpack_from("=HBBI", program, offset) for offset in range(0, len(program), 8)]
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, k = steps[at]
        at += 1
        if code == 0x06:
            return int(k)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        else:
            holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            at += if_true if holds else if_false


def outcome(machine: str, name: str, *arguments: int, setgid: bool = False) -> int | None:
    """0 for allowed, else the errno; None where the machine has no such call."""
    call = seccomp.number(name, machine)
    if call is None:
        return None
    done = decide(seccomp.denylist(machine, setgid=setgid), seccomp.AUDIT_ARCH[machine], call, arguments)
    return 0 if done == ALLOW else done - ERRNO


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    "name", ["bpf", "perf_event_open", "userfaultfd", "keyctl", "io_uring_setup", "ptrace", "setns"]
)
@pytest.mark.parametrize("argument", [0, 1, 2**64 - 1])
def test_what_is_denied_is_denied_whatever_its_arguments(machine: str, name: str, argument: int) -> None:
    """No argument makes a denied call pass."""
    assert outcome(machine, name, *[argument] * 6) == errno.EPERM


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    "name", ["mount", "umount2", "fsopen", "move_mount", "open_tree", "open_tree_attr", "pivot_root"]
)
def test_no_mount_call_is_left(machine: str, name: str) -> None:
    """Old and new ways to mount are closed."""
    assert outcome(machine, name) == errno.EPERM


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["clone3", "openat2"])
def test_calls_whose_arguments_cannot_be_seen_do_not_exist(machine: str, name: str) -> None:
    """ENOSYS makes the C library fall back to a call that can be looked at."""
    assert outcome(machine, name) == errno.ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("flag", [0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000])
def test_new_namespaces_are_denied(machine: str, flag: int) -> None:
    """Neither clone nor unshare makes one, alone or among other flags."""
    thread = 0x003D0F00
    assert outcome(machine, "unshare", flag) == errno.EPERM
    assert outcome(machine, "clone", flag | thread) == errno.EPERM
    assert outcome(machine, "clone", thread) == 0
    assert outcome(machine, "clone", 17) == 0, "fork: SIGCHLD alone"


@pytest.mark.parametrize("machine", MACHINES)
def test_a_time_namespace_is_denied_to_unshare(machine: str) -> None:
    """Its flag lies among clone's signal bits, so only unshare has it."""
    assert outcome(machine, "unshare", 0x80) == errno.EPERM
    assert outcome(machine, "unshare", 0x400) == 0, "CLONE_FILES makes no namespace"


@pytest.mark.parametrize("machine", MACHINES)
def test_only_known_socket_families_exist(machine: str) -> None:
    """A vsock reaches the host's hypervisor from any network namespace."""
    for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
        assert outcome(machine, "socket", family) == 0
    for other in map(int, (socket.AF_VSOCK, socket.AF_ALG, socket.AF_PACKET, 0, 45)):
        assert outcome(machine, "socket", other) == errno.EAFNOSUPPORT
        assert outcome(machine, "socketpair", other) == errno.EAFNOSUPPORT


@pytest.mark.parametrize("machine", MACHINES)
def test_nobody_types_into_a_terminal_but_its_user(machine: str) -> None:
    """TIOCSTI and TIOCLINUX are denied, with anything in the upper half of the argument."""
    for request in (0x5412, 0x541C, 0x1_0000_5412):
        assert outcome(machine, "ioctl", 1, request) == errno.EPERM
    assert outcome(machine, "ioctl", 1, 0x5413) == 0, "TIOCGWINSZ"


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("name", "index"), SETTING_A_MODE)
def test_set_user_id_bits_are_denied(machine: str, name: str, index: int) -> None:
    """A file in a workspace must not become a program that runs as its owner on the host."""
    before = [0] * index
    assert outcome(machine, name, *before, 0o755) in (0, None)
    assert outcome(machine, name, *before, 0o755 | stat.S_ISUID) in (errno.EPERM, None)
    assert outcome(machine, name, *before, 0o755 | stat.S_ISGID) in (0, None)
    assert outcome(machine, name, *before, 0o755 | stat.S_ISGID, setgid=True) in (errno.EPERM, None)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("name", "flags"), [("open", 1), ("openat", 2)])
def test_a_file_cannot_be_created_with_such_bits(machine: str, name: str, flags: int) -> None:
    """The mode counts only where the call creates a file; what stands there otherwise is left over in a register."""
    creates, temporary, reads = 0o101, 0o20200001, 0
    arguments = [0] * flags
    assert outcome(machine, name, *arguments, reads, 0o4755) in (0, None)
    assert outcome(machine, name, *arguments, creates, 0o755) in (0, None)
    for flag in (creates, temporary):
        assert outcome(machine, name, *arguments, flag, 0o4755) in (errno.EPERM, None)


@pytest.mark.parametrize("machine", MACHINES)
def test_everything_else_is_allowed(machine: str) -> None:
    """The filter is a list of what is denied: kernels to come are not its business."""
    program, arch = seccomp.denylist(machine), seccomp.AUDIT_ARCH[machine]
    listed = {seccomp.number(name, machine) for name in seccomp._NUMBERS}
    assert all(decide(program, arch, call) == ALLOW for call in range(600) if call not in listed)


@pytest.mark.parametrize("machine", MACHINES)
def test_programs_of_another_machine_are_killed(machine: str) -> None:
    """32-bit programs have other numbers, so the list would not hold for them."""
    assert decide(seccomp.denylist(machine), 0x40000003, 1) == KILL


def test_the_x32_numbers_do_not_exist() -> None:
    """On x86-64 each call has a second number, which must not be a way around the list."""
    program, arch = seccomp.denylist("x86_64"), seccomp.AUDIT_ARCH["x86_64"]
    assert decide(program, arch, 0x40000000 | 165) == ERRNO | errno.ENOSYS
    assert decide(program, arch, 0x40000000) == ERRNO | errno.ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_to_be_absent_is_and_nothing_else(machine: str) -> None:
    """A program finds a kernel without that call, and everything else as it was."""
    program, arch = seccomp.absent("membarrier", machine=machine), seccomp.AUDIT_ARCH[machine]
    call = seccomp.number("membarrier", machine)
    assert call is not None
    assert decide(program, arch, call) == ERRNO | errno.ENOSYS
    assert {decide(program, arch, other) for other in range(500) if other != call} == {ALLOW}


def test_every_jump_stays_inside() -> None:
    """The kernel refuses a filter that could run past its end; one of 4096 steps or more too."""
    for machine in MACHINES:
        program = seccomp.denylist(machine, setgid=True)
        steps = [struct.unpack_from("=HBBI", program, offset) for offset in range(0, len(program), 8)]
        assert len(steps) < 4096
        assert all(at + 1 + max(step[1], step[2]) < len(steps) for at, step in enumerate(steps) if step[0] & 7 == 5)


def test_a_machine_without_a_list_gets_no_sandbox() -> None:
    """Rather none than one without a filter."""
    with pytest.raises(BackendUnavailableError, match="riscv64") as raised:
        seccomp.denylist("riscv64")
    assert "x86_64" in raised.value.hint


def test_the_list_is_that_of_this_machine_by_default() -> None:
    """`uname -m` decides."""
    assert seccomp.denylist() == seccomp.denylist(platform.machine())
