"""The system call filter of every sandbox, assembled as classic BPF.

What is not listed is allowed. Listed is what no notebook needs and what has served to break out: the mount and
namespace families, kernel keyrings, BPF, io_uring, userfaultfd, performance counters, tracing, modules, clocks,
terminals that type for others, socket families beyond Unix, IP and netlink (a vsock reaches the host from any network
namespace), and set-user-ID bits on files that a workspace would carry to the host.
"""

import errno
import functools
import platform
import socket
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from warmcell.sandbox.errors import BackendUnavailableError

AUDIT_ARCH: Mapping[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# For each name its number on x86_64 and on aarch64; None where that machine has no such call.
_OCI_MACHINES: Mapping[str, str] = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_NEWER = ("open_tree_attr",)
"""What kernels that are not Linux may not know by name."""

_NUMBERS: Mapping[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chmod": (90, None),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "clone3": (435, 435),
    "creat": (85, None),
    "create_module": (174, None),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "get_kernel_syms": (177, None),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "membarrier": (324, 283),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "nfsservctl": (180, 42),
    "open": (2, None),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "openat": (257, 56),
    "openat2": (437, 437),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_open": (434, 434),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "query_module": (178, None),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "uselib": (134, None),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}

_DENIED = (
    "acct", "add_key", "bpf", "clock_adjtime", "clock_settime", "create_module", "delete_module", "fanotify_init",
    "finit_module", "fsconfig", "fsmount", "fsopen", "fspick", "get_kernel_syms", "init_module", "io_uring_enter",
    "io_uring_register", "io_uring_setup", "ioperm", "iopl", "kexec_file_load", "kexec_load", "keyctl",
    "lookup_dcookie", "mount", "mount_setattr", "move_mount", "nfsservctl", "open_by_handle_at", "open_tree",
    "open_tree_attr", "perf_event_open", "pivot_root", "process_vm_writev", "ptrace", "query_module", "quotactl",
    "quotactl_fd", "reboot", "request_key", "setdomainname", "sethostname", "setns", "settimeofday", "swapoff",
    "swapon", "syslog", "umount2", "uselib", "userfaultfd", "vhangup",
)  # fmt: skip

_ABSENT = ("clone3", "openat2")
"""Their arguments lie in memory, where a filter cannot look; callers fall back to the older calls."""

_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
_NEW_TIME_NAMESPACE = 0x80
_TERMINAL_INPUT = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX put characters into somebody else's terminal."""
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
_PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)
"""Linux, UNAME26 and their mixtures, no address randomisation (debuggers), and the question what it is."""
_CREATE_BITS = (0o100, 0o20000000)
_CREATES = _CREATE_BITS[0] | _CREATE_BITS[1]
"""O_CREAT and O_TMPFILE."""

_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_X32_BIT = 0x40000000

Instruction = tuple[int, int, int, int]
"""code, jump if true, jump if false, k."""


@dataclass(frozen=True, slots=True)
class _Bits:
    """True where argument `index` has any bit of `mask`."""

    index: int
    mask: int


@functools.cache
def denylist(machine: str | None = None, *, setgid: bool = False) -> bytes:
    """The filter as `struct sock_filter[]`, for bubblewrap's `--seccomp`.

    Args:
        machine: As `uname -m` says it; this machine if None.
        setgid: Also refuse set-group-ID bits. They are normal on shared directories, so only where the guest writes
            as another group than its own.

    Raises:
        BackendUnavailableError: The numbers of this machine's system calls are not known.
    """
    machine = machine or platform.machine()
    if machine not in AUDIT_ARCH:
        raise BackendUnavailableError(
            f"There is no system call filter for {machine}", hint=f"Use a machine of {', '.join(AUDIT_ARCH)}."
        )
    return b"".join(struct.pack("=HBBI", *step) for step in _program(machine, _DENIED, setgid=setgid))


def template(machine: str | None = None) -> bytes:
    """The filter of a template's process: it may enter sandboxes whose descriptors it is given, and find none itself.

    Its forks have it too, below their own.

    Raises:
        BackendUnavailableError: As `denylist`.
    """
    denylist(machine)
    denied = (*(name for name in _DENIED if name != "setns"), "pidfd_open", "process_vm_readv")
    return b"".join(struct.pack("=HBBI", *step) for step in _program(machine or platform.machine(), denied))


def absent(*names: str, machine: str | None = None) -> bytes:
    """A filter after which these system calls are as on a kernel that has none; anything else is allowed."""
    machine = machine or platform.machine()
    calls = [call for name in names if (call := number(name, machine)) is not None]
    program: list[Instruction] = [(_LD, 0, 0, 0)]
    for call in calls:
        program += [(_JEQ, 0, 1, call), _refuse(errno.ENOSYS)]
    return b"".join(struct.pack("=HBBI", *step) for step in [*program, (_RET, 0, 0, _ALLOW)])


def rules(machine: str | None = None) -> dict[str, Any]:
    """The filter as an OCI configuration has it, for a kernel of the sandbox's own.

    Left out is what such a kernel does not have at all: other socket families, terminals that type for others. Left out
    too is clone3: gVisor of 2024 knows no error but EPERM, for which the C library does not fall back to clone. What it
    can make are namespaces of the sandbox's own kernel.

    Raises:
        BackendUnavailableError: As `denylist`.
    """
    machine = machine or platform.machine()
    denylist(machine)
    bits = (stat.S_ISUID, stat.S_ISGID)

    def refuse(names: Sequence[str], *args: tuple[int, int]) -> dict[str, Any]:
        known = [name for name in names if number(name, machine) is not None]
        same = [{"index": index, "value": bit, "valueTwo": bit, "op": "SCMP_CMP_MASKED_EQ"} for index, bit in args]
        return {"names": known, "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM, **({"args": same} if args else {})}

    namespaces = [1 << bit for bit in range(32) if _NAMESPACES & 1 << bit]
    made = [
        refuse([name for name in _DENIED if name not in _NEWER]),
        *(refuse(("clone", "unshare"), (0, bit)) for bit in namespaces),
        *(refuse(("chmod", "fchmod", "creat", "mknod", "mkdir"), (1, bit)) for bit in bits),
        *(refuse(("fchmodat", "mknodat", "mkdirat"), (2, bit)) for bit in bits),
        *(refuse(("open",), (1, create), (2, bit)) for bit in bits for create in _CREATE_BITS),
        *(refuse(("openat",), (2, create), (3, bit)) for bit in bits for create in _CREATE_BITS),
    ]
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": [_OCI_MACHINES[machine]],
        "syscalls": [rule for rule in made if rule["names"]],
    }


def number(name: str, machine: str) -> int | None:
    """The number of a system call that the filter knows, None where the machine has no such call."""
    return _NUMBERS[name][list(AUDIT_ARCH).index(machine)]


def _program(machine: str, denied: Sequence[str], *, setgid: bool = False) -> list[Instruction]:
    bits = stat.S_ISUID | (stat.S_ISGID if setgid else 0)
    program: list[Instruction] = [
        (_LD, 0, 0, 4),
        (_JEQ, 1, 0, AUDIT_ARCH[machine]),
        (_RET, 0, 0, _KILL),  # 32-bit programs: another table of numbers.
        (_LD, 0, 0, 0),
    ]
    if machine == "x86_64":
        program += [(_JGE, 0, 1, _X32_BIT), _refuse(errno.ENOSYS)]

    def add(name: str, body: Sequence[Instruction]) -> None:
        """`body` decides about the call `name`; it ends in a return."""
        call = number(name, machine)
        if call is not None:
            program.extend([(_JEQ, 0, len(body), call), *body])

    for name in denied:
        add(name, [_refuse(errno.EPERM)])
    for name in _ABSENT:
        add(name, [_refuse(errno.ENOSYS)])
    add("clone", _refuse_if(_Bits(0, _NAMESPACES)))
    add("unshare", _refuse_if(_Bits(0, _NAMESPACES | _NEW_TIME_NAMESPACE)))
    add("ioctl", _refuse_if_equal(1, _TERMINAL_INPUT))
    for name in ("socket", "socketpair"):
        add(name, _refuse_unless_equal(0, _FAMILIES, errno.EAFNOSUPPORT))
    add("personality", _refuse_unless_equal(0, _PERSONALITIES, errno.EPERM))
    for name, index in (("chmod", 1), ("fchmod", 1), ("fchmodat", 2), ("fchmodat2", 2), ("creat", 1)):
        add(name, _refuse_if(_Bits(index, bits)))
    for name, index in (("mknod", 1), ("mknodat", 2), ("mkdir", 1), ("mkdirat", 2)):
        add(name, _refuse_if(_Bits(index, bits)))
    add("open", _refuse_if(_Bits(1, _CREATES), _Bits(2, bits)))
    add("openat", _refuse_if(_Bits(2, _CREATES), _Bits(3, bits)))
    return [*program, (_RET, 0, 0, _ALLOW)]


def _refuse(number: int) -> Instruction:
    return (_RET, 0, 0, _ERRNO | number)


def _argument(index: int) -> Instruction:
    """Load the low word of an argument: the kernel takes these as 32 bits, and both machines are little-endian."""
    return (_LD, 0, 0, 16 + 8 * index)


def _refuse_if(*conditions: _Bits) -> list[Instruction]:
    """EPERM where all conditions hold, else allowed."""
    body: list[Instruction] = []
    steps = 2 * len(conditions)
    for done, condition in enumerate(conditions):
        to_allow = steps - 2 * done - 1
        body += [_argument(condition.index), (_JSET, 0, to_allow, condition.mask)]
    return [*body, _refuse(errno.EPERM), (_RET, 0, 0, _ALLOW)]


def _refuse_if_equal(index: int, values: Sequence[int]) -> list[Instruction]:
    tests: list[Instruction] = [(_JEQ, len(values) - n, 0, value) for n, value in enumerate(values)]
    return [_argument(index), *tests, (_RET, 0, 0, _ALLOW), _refuse(errno.EPERM)]


def _refuse_unless_equal(index: int, values: Sequence[int], error: int) -> list[Instruction]:
    tests: list[Instruction] = [(_JEQ, len(values) - n, 0, value) for n, value in enumerate(values)]
    return [_argument(index), *tests, _refuse(error), (_RET, 0, 0, _ALLOW)]
