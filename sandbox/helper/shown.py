"""Descriptors that a caller has opened, as trees that a sandbox can show: what the caller could reach, and no more.

A descriptor proves that its sender could reach what it names. It is never opened by a name again, so what is mounted or
linked at that name later is of no account. Mounts below it come with it, since without them what they cover would show.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat

from warmcell.sandbox.helper import linux
from warmcell.sandbox.helper.problems import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from warmcell.sandbox.helper.wanted import Tree

NS_GET_USERNS, NS_GET_NSTYPE = 0xB701, 0xB703
AT_RECURSIVE = 0x8000
MS_PRIVATE = 0x40000
_PSEUDO = frozenset(
    {
        0x9FA0,  # proc
        0x62656572,  # sysfs
        0x27E0EB,  # cgroup
        0x63677270,  # cgroup2
        0x1CD1,  # devpts
        0x6E736673,  # nsfs
        0x50494446,  # pidfs
        0x64626720,  # debugfs
        0x74726163,  # tracefs
        0x73636673,  # securityfs
        0xCAFE4A11,  # bpf
        0x42494E4D,  # binfmt_misc
        0x62656570,  # configfs
        0x19800202,  # mqueue
        0xDE5E81E4,  # efivarfs
        0x6165676C,  # pstore
        0xF97CFF8C,  # selinuxfs
        0x43415D53,  # smackfs
        0x5A3C69F0,  # apparmorfs
        0x09041934,  # anonymous inodes
        0x534F434B,  # sockets
        0x50495045,  # pipes
    }
)
"""File systems that are windows into the kernel."""


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


_libc = ctypes.CDLL(None, use_errno=True)


def clone_all(trees: tuple[Tree, ...], mounts: int, uid: int, gid: int) -> Mapping[str, int]:
    """A detached mount for each tree by its name, private, without devices and set-user-ID.

    Args:
        trees: What to show.
        mounts: The mount namespace that they were opened in.
        uid: Whose they are to be shown to.
        gid: Likewise.

    Raises:
        HelperError: One of them is nothing that can be shown.
    """
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check_mounts(mounts)
        for tree in trees:
            _check(tree)
        _check_rights(trees, uid, gid)
        elsewhere = not os.path.samestat(os.fstat(own), os.fstat(mounts))
        if elsewhere:
            linux.setns(mounts)
        try:
            return {tree.name: _clone(tree) for tree in trees}
        finally:
            if elsewhere:
                linux.setns(own)
                os.chdir("/")
    finally:
        os.close(own)


def _check_mounts(fd: int) -> None:
    """It is a mount namespace that root has made: in a user's own everything may be what that user likes."""
    refusal = HelperError(
        "unsupported",
        "The helper makes no sandboxes for who is in a user namespace of their own",
        hint="Run the keeper outside of it.",
    )
    try:
        if fcntl.ioctl(fd, NS_GET_NSTYPE) != linux.CLONE_NEWNS:
            raise refusal
        owner = fcntl.ioctl(fd, NS_GET_USERNS)
    except OSError as error:
        raise refusal from error
    try:
        if not os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user")):
            raise refusal
    finally:
        os.close(owner)


def _check(tree: Tree) -> None:
    found = os.fstat(tree.fd)
    if not stat.S_ISDIR(found.st_mode) and not (stat.S_ISREG(found.st_mode) and not tree.name.startswith("saved")):
        raise _refused(tree, "is neither a directory nor a plain file")
    if file_system(tree.fd) in _PSEUDO:
        raise _refused(tree, "is a part of the kernel's, not of a disk")


def _check_rights(trees: tuple[Tree, ...], uid: int, gid: int) -> None:
    """The caller may read the top of each: a descriptor can be had of what may not be read."""
    with linux.files_of(uid, gid):
        for tree in trees:
            need = os.R_OK | (os.X_OK if stat.S_ISDIR(os.fstat(tree.fd).st_mode) else 0)
            if not linux.may_access(tree.fd, need):
                raise HelperError(
                    "invalid_request",
                    f"{tree.target or tree.name} may not be read by you",
                    hint="A sandbox shows what its user may read without the rights of further groups.",
                )


def file_system(fd: int) -> int:
    """The kind of the file system that a descriptor is on."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "fstatfs")
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF


def _clone(tree: Tree) -> int:
    flags = linux.OPEN_TREE_CLONE | linux.OPEN_TREE_CLOEXEC | linux.AT_EMPTY_PATH | AT_RECURSIVE
    made = _libc.syscall(linux.SYS_OPEN_TREE, tree.fd, b"", flags)
    if made < 0:
        number = ctypes.get_errno()
        why = "is on a mount that is not of the keeper's" if number == errno.EINVAL else os.strerror(number)
        raise _refused(tree, why)
    closed = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV
    if not tree.writable:
        closed |= linux.MOUNT_ATTR_RDONLY
    attributes = _MountAttr(closed, 0, MS_PRIVATE, 0)
    flags, size = linux.AT_EMPTY_PATH | AT_RECURSIVE, ctypes.sizeof(attributes)
    if _libc.syscall(linux.SYS_MOUNT_SETATTR, made, b"", flags, ctypes.byref(attributes), size) < 0:
        raise _refused(tree, os.strerror(ctypes.get_errno()))
    return int(made)


def _refused(tree: Tree, why: str) -> HelperError:
    return HelperError(
        "invalid_request", f"{tree.target or tree.name} cannot be shown: it {why}", hint="Choose another directory."
    )
