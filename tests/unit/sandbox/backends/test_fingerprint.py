"""A template is made anew where something of its environment has changed, and only there."""

import os
from pathlib import Path

import pytest

from tests.unit.sandbox.backends.test_environment import interpreter, virtual_environment
from warmcell.sandbox.backends import fingerprint as fingerprints
from warmcell.sandbox.backends.fingerprint import fingerprint

PRELOAD = ("numpy", "mine.deep")


def package(place: Path, name: str = "numpy") -> Path:
    """One that is installed there."""
    directory = place / name
    directory.mkdir(parents=True)
    (directory / "__init__.py").write_text("x = 1\n")
    return directory


def upgraded(directory: Path) -> None:
    """As dpkg does it: another file takes the place of one, and what is above does not change."""
    (directory / "new").write_text("x = 2\n")
    (directory / "new").rename(directory / "__init__.py")
    later(directory)


def later(path: Path) -> None:
    """Its time is another one, however coarse the clock of the file system is."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize(
    "where",
    ["lib/python3.12/site-packages", "lib/python3/dist-packages", "local/lib/python3.12/dist-packages"],
)
def test_packages_of_an_installation(tmp_path: Path, where: str) -> None:
    """Debian's directories count as well as Python's own, also if a package keeps its version."""
    python = str(interpreter(tmp_path / "base"))
    numpy = package(tmp_path / "base" / where)
    before = fingerprint(python, PRELOAD)
    assert fingerprint(python, PRELOAD) == before
    upgraded(numpy)
    after = fingerprint(python, PRELOAD)
    assert after != before
    package(numpy.parent, "scipy")
    later(numpy.parent)
    assert fingerprint(python, PRELOAD) != after


@pytest.mark.parametrize("shared", [True, False])
def test_a_virtual_environment_that_has_its_bases_packages(tmp_path: Path, shared: bool) -> None:
    """What is installed below it counts if it can be imported, and not otherwise."""
    interpreter(tmp_path / "base")
    python = virtual_environment(tmp_path / "venv", tmp_path / "base")
    settings = tmp_path / "venv" / "pyvenv.cfg"
    settings.write_text(f"{settings.read_text()}include-system-site-packages = {str(shared).lower()}\n")
    numpy = package(tmp_path / "base" / "lib" / "python3" / "dist-packages")
    before = fingerprint(str(python), PRELOAD)
    upgraded(numpy)
    assert (fingerprint(str(python), PRELOAD) != before) is shared


@pytest.mark.parametrize("how", ["path", "finder"])
def test_the_sources_of_an_editable_package(tmp_path: Path, how: str) -> None:
    """A template that has imported it has it as it was; others do not care."""
    python = str(interpreter(tmp_path / "base"))
    place = tmp_path / "base" / "lib" / "python3.12" / "site-packages"
    place.mkdir()
    deep = package(tmp_path / "src", "mine") / "deep" / "module.py"
    deep.parent.mkdir()
    deep.write_text("x = 1\n")
    if how == "path":
        (place / "mine.pth").write_text(f"# ours\n{tmp_path / 'src'}\n")
    else:
        (place / "__editable__.mine-1.pth").write_text("import __editable___mine_finder; __editable___mine_finder.go()")
        found = f"MAPPING: dict[str, str] = {{'mine': {str(tmp_path / 'src' / 'mine')!r}}}\n"
        (place / "__editable___mine_finder.py").write_text(f"import sys\n{found}def go(): raise SystemExit\n")
    before, without = fingerprint(python, PRELOAD), fingerprint(python, ("numpy",))
    deep.write_text("x = 22\n")
    assert fingerprint(python, PRELOAD) != before
    assert fingerprint(python, ("numpy",)) == without


def test_what_the_distributions_package_manager_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the system's own Python: it may replace a library that no name here stands for."""
    python = str(interpreter(tmp_path / "usr"))
    database = tmp_path / "status"
    database.write_text("before")
    monkeypatch.setattr(fingerprints, "SYSTEM", tmp_path / "usr")
    monkeypatch.setattr(fingerprints, "PACKAGE_DATABASES", (database, tmp_path / "absent"))
    before = fingerprint(python)
    database.write_text("after that")
    assert fingerprint(python) != before
