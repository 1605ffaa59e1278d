"""Why a sandbox did not come up, as an error with its cure."""

import errno
import re
from pathlib import Path

from warmcell.sandbox.backends.child import StageFailedError
from warmcell.sandbox.backends.stage.linux import RESTRICT
from warmcell.sandbox.errors import BackendUnavailableError, SandboxStartError, WarmcellError

_REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EINVAL, errno.ENOSYS, errno.EUSERS)
_NAMESPACE_STEPS = (
    "user namespace",
    "mount namespace",
    "mount private",
    "mount tmpfs",
    "mount proc",
    "uid_map",
    "gid_map",
    "setgroups",
)
_BWRAP_NAMESPACE = re.compile(
    r"(No permissions to creat\w* new namespace|Creating new namespace failed|setting up uid map|loopback: Failed"
    r"|Can't mount proc|Failed to make / slave)"
)


def explain(failure: StageFailedError, *, as_root: bool) -> WarmcellError:
    """The error for a start that failed; namespaces that this machine forbids become `BackendUnavailableError`."""
    said = failure.stderr.strip()
    stage = failure.errno in _REFUSALS and any(step in failure.step for step in _NAMESPACE_STEPS)
    if stage or _BWRAP_NAMESPACE.search(said):
        why, cure = forbidden(as_root=as_root)
        return BackendUnavailableError(
            f"This machine forbids {'namespaces' if as_root else 'user namespaces'} here: {why}",
            hint=cure,
            details={"step": str(failure), "stderr": said},
        )
    if failure.errno == errno.ENOSYS and failure.step == RESTRICT:
        return BackendUnavailableError(
            "The kernel is too old: it cannot give attributes to all mounts of a tree",
            hint="Boot Linux 5.12 or newer.",
            details={"step": str(failure), "stderr": said},
        )
    return SandboxStartError(
        f"The sandbox could not start: {said or failure}",
        hint="`warmcell doctor` says what this machine lacks.",
        details={"step": str(failure), "stderr": said},
    )


def forbidden(*, as_root: bool) -> tuple[str, str]:
    """What forbids namespaces, and the one command that root has to run."""
    if as_root:
        return (
            "root lacks CAP_SYS_ADMIN, or a system call filter denies unshare and mount",
            "In a container, start it with: docker run --security-opt seccomp=unconfined --cap-add SYS_ADMIN …",
        )
    if _number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == 1:
        return (
            "AppArmor restricts unprivileged user namespaces",
            _as_root("kernel.apparmor_restrict_unprivileged_userns=0"),
        )
    if _number("/proc/sys/kernel/unprivileged_userns_clone") == 0:
        return "kernel.unprivileged_userns_clone is 0", _as_root("kernel.unprivileged_userns_clone=1")
    most = _number("/proc/sys/user/max_user_namespaces")
    if most is not None and most < 2:
        return f"user.max_user_namespaces is {most}", _as_root("user.max_user_namespaces=28633")
    if _seccomp_filtered():
        return (
            "a system call filter denies them, as container engines' default filters do",
            "Start the container with: docker run --security-opt seccomp=unconfined …",
        )
    return (
        "the kernel refuses to make one, without saying which rule forbids it",
        _as_root("user.max_user_namespaces=28633"),
    )


def _as_root(setting: str) -> str:
    return f"Run once as root: sysctl -w {setting}"


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def _seccomp_filtered() -> bool:
    try:
        return "Seccomp:\t2" in Path("/proc/self/status").read_text()
    except OSError:
        return False
