"""The program that installs conda's packages: what it tells of where they come from."""

import os
import signal
from pathlib import Path

import pytest

from warmcell.sandbox.images.conda_install import Alias, survive


@pytest.mark.parametrize(
    ("address", "said", "told"),
    [
        ("https://a:pw/x@h/c", "a package https://a:pw/x@h/c pw%2Fx", "a package https://***:***@h/c ***"),
        ("https://a:secret@h", "a package of https://a:secret@h", "a package of https://***:***@h"),
        ("https://tok-en@h/c", "tok-en at https://tok-en@h/c", "*** at https://***@h/c"),
        ("https://h/t/tok-en/c", "https://h/t/tok-en/c", "https://h/t/***/c"),
        ("https://h/c", "a package of https://h/c", "a package of https://h/c"),
    ],
)
def test_secrets_are_hidden_and_words_are_not(address: str, said: str, told: str) -> None:
    """A user's name may be a letter, which is in most words."""
    assert Alias(address).hide(said) == told


@pytest.mark.parametrize(
    ("ends", "code", "told"),
    [
        ([signal.SIGSEGV], 0, "SIGSEGV ended py-rattler; once more\n"),
        ([signal.SIGSEGV, signal.SIGABRT], 134, "SIGSEGV ended py-rattler; once more\nSIGABRT ended py-rattler\n"),
        ([signal.SIGKILL], 137, "SIGKILL ended py-rattler\n"),
    ],
)
def test_a_crash_is_survived_once(
    ends: list[signal.Signals], code: int, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that was killed, for its memory say, is not begun anew."""
    begun = tmp_path / "begun"

    def work() -> int:
        with begun.open("a") as file:
            file.write("x")
        if len(begun.read_text()) <= len(ends):
            signal.signal(ends[len(begun.read_text()) - 1], signal.SIG_DFL) if ends[0] != signal.SIGKILL else None
            os.kill(os.getpid(), ends[len(begun.read_text()) - 1])
        return 0

    assert survive(work) == code
    assert "".join(line for line in capfd.readouterr().err.splitlines(True) if "py-rattler" in line) == told
