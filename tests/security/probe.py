"""Looks around in a sandbox as somebody who wants out, and prints what it finds as JSON.

Run inside with the environment's Python: `python -I probe.py`. Nothing but the standard library.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import socket
import stat
import sys

libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"
SYSCALLS = {
    "bpf": 321 if X86 else 280,
    "delete_module": 176 if X86 else 106,
    "fsopen": 430,
    "init_module": 175 if X86 else 105,
    "io_uring_setup": 425,
    "kexec_load": 246 if X86 else 104,
    "keyctl": 250 if X86 else 219,
    "mount": 165 if X86 else 40,
    "move_mount": 429,
    "open_by_handle_at": 304 if X86 else 265,
    "open_tree": 428,
    "perf_event_open": 298 if X86 else 241,
    "pivot_root": 155 if X86 else 41,
    "ptrace": 101 if X86 else 117,
    "setns": 308 if X86 else 268,
    "umount2": 166 if X86 else 39,
    "userfaultfd": 323 if X86 else 282,
    "clone3": 435,
    "openat2": 437,
}
NAMESPACE_FLAGS = {"mnt": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
                   "pid": 0x20000000, "net": 0x40000000, "time": 0x80}  # fmt: skip
WRITES = (
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/vm/drop_caches",
    "/proc/sys/fs/binfmt_misc/register",
    "/proc/sysrq-trigger",
    "/proc/1/mem",
    "/proc/1/oom_score_adj",
    "/sys/kernel/uevent_helper",
    "/sys/fs/cgroup/release_agent",
    "/sys/fs/cgroup/cgroup.procs",
    "/sys/fs/cgroup/memory/release_agent",
    "/dev/kmsg",
    "/dev/mem",
    "/etc/passwd",
    "/usr/bin/x",
    "/warmcell/init.py",
)
READS = (
    "/etc/shadow",
    "/etc/ssh/ssh_host_ed25519_key",
    "/proc/kcore",
    "/proc/1/environ",
    "/proc/keys",
    "/proc/kmsg",
    "/var/run/docker.sock",
    "/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/systemd/private",
    "/sys/kernel/debug",
    "/sys/kernel/security",
    "/sys/firmware",
    "/root/.ssh",
    "/root/.bash_history",
)
ADDRESSES = (
    ("169.254.169.254", 80),
    ("fd00:ec2::254", 80),
    ("10.0.0.1", 80),
    ("172.17.0.1", 80),
    ("192.168.0.1", 80),
    ("1.1.1.1", 53),
    ("8.8.8.8", 443),
    ("127.0.0.53", 53),
)


def error_of(call):
    """The name of the errno with which `call` fails, "" if it succeeds."""
    try:
        call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return ""


def syscall(name):
    """How a system call fails that is given nothing sensible; "" if it does not."""
    ctypes.set_errno(0)
    result = libc.syscall(SYSCALLS[name], *[ctypes.c_long(0)] * 6)
    return errno.errorcode.get(ctypes.get_errno(), "") if result < 0 else ""


def status():
    with open("/proc/self/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


def unshared(flag):
    """How a new namespace fails; tried in a child."""
    child = os.fork()
    if child == 0:
        os._exit(0 if libc.unshare(flag) == 0 else ctypes.get_errno() & 0xFF)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return errno.errorcode.get(code, "") if code else ""


def written(path):
    """Open for writing; what anybody may open is written as it is, since the kernel may check only then."""
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if path.startswith("/proc/sys/"):
            with open(path, "rb") as file:
                os.write(fd, file.read())
    finally:
        os.close(fd)


def listed(path):
    """Whether anything of a path can be read; what engines of containers put over it is empty."""
    if os.path.isdir(path):
        found = os.listdir(path)
    else:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.read(fd, 1)
        finally:
            os.close(fd)
    if not found:
        raise OSError(errno.ENODATA, "nothing is in it")


def connected(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(2)
        client.connect((address, port))


def mounts():
    found = []
    with open("/proc/self/mountinfo") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            fields, kind = left.split(), right.split()[0]
            found.append({"at": fields[4], "root": fields[3], "options": fields[5].split(","), "kind": kind})
    return found


def sockets():
    """Sockets in the file system, whoever listens on them."""
    found = []
    for top, names, files in os.walk("/", onerror=lambda error: None):
        names[:] = [name for name in names if os.path.join(top, name) not in ("/proc", "/sys", "/usr")]
        for name in files:
            with contextlib.suppress(OSError):
                path = os.path.join(top, name)
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    found.append(path)
    return found


def kernel_addresses():
    """Whether addresses of the kernel are told."""
    try:
        with open("/proc/kallsyms") as file:
            return any(int(line.split()[0], 16) for line in [file.readline() for _ in range(5)] if line)
    except OSError:
        return False


def device_nodes():
    return sorted(
        os.path.join(top, name)
        for top, _, files in os.walk("/dev")
        for name in files
        if stat.S_IFMT(os.lstat(os.path.join(top, name)).st_mode) in (stat.S_IFBLK, stat.S_IFCHR)
    )


def families():
    """Socket families beyond the usual that can be had."""
    numbers = {"packet": 17, "alg": 38, "vsock": 40, "bluetooth": 31, "tipc": 30, "rds": 21, "can": 29, "xdp": 44}
    return {name: error_of(lambda n=n: socket.socket(n, socket.SOCK_DGRAM).close()) for name, n in numbers.items()}


def main():
    looked = status()
    found = {
        "uid": os.getuid(),
        "groups": os.getgroups(),
        "capabilities": {name: looked[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")},
        "no_new_privs": looked["NoNewPrivs"],
        "seccomp": looked["Seccomp"],
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")},
        "environment": dict(os.environ),
        "syscalls": {name: syscall(name) for name in SYSCALLS},
        "unshare": {name: unshared(flag) for name, flag in NAMESPACE_FLAGS.items()},
        "families": families(),
        "raw": error_of(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close()),
        "writes": {path: error_of(lambda path=path: written(path)) for path in WRITES},
        "reads": {path: error_of(lambda path=path: listed(path)) for path in READS},
        "root_of_init": error_of(lambda: os.listdir("/proc/1/root")),
        "mounts": mounts(),
        "sockets": sockets(),
        "devices": device_nodes(),
        "kernel_addresses": kernel_addresses(),
        "addresses": {address: error_of(lambda a=address, p=port: connected(a, p)) for address, port in ADDRESSES},
        "name": error_of(lambda: socket.getaddrinfo("example.org", 80)) if len(sys.argv) > 1 else "",
        "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
        "chroot": error_of(lambda: os.chroot("/")),
        "mknod": error_of(lambda: os.mknod("/tmp/device", 0o600 | stat.S_IFBLK, os.makedev(8, 0))),
        "set_user_id": error_of(lambda: os.chmod("/tmp", 0o4777)),
        "setuid": error_of(lambda: os.setuid(0)),
        "priority": error_of(lambda: os.nice(-5)),
        "open_files": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
