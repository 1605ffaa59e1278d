"""Python environments are found by looking, never by running them."""

import shutil
import sys
from pathlib import Path

import pytest

from warmcell.sandbox.backends.environment import discover
from warmcell.sandbox.errors import InvalidRequestError

ELF = b"\x7fELF\x02\x01\x01"


def interpreter(prefix: Path, version: str = "3.12") -> Path:
    """An installation as far as looking goes."""
    library = prefix / "lib" / f"python{version}"
    library.mkdir(parents=True)
    (library / "os.py").touch()
    (prefix / "bin").mkdir(exist_ok=True)
    program = prefix / "bin" / f"python{version}"
    program.write_bytes(ELF)
    program.chmod(0o755)
    (prefix / "bin" / "python3").symlink_to(program.name)
    return program


def virtual_environment(prefix: Path, base: Path, version: str = "3.12", home: Path | None = None) -> Path:
    """One made from the installation at `base`."""
    (prefix / "bin").mkdir(parents=True)
    (prefix / "lib" / f"python{version}" / "site-packages").mkdir(parents=True)
    (prefix / "pyvenv.cfg").write_text(f"home = {home or base / 'bin'}\nversion = {version}.1\n")
    (prefix / "bin" / "python").symlink_to(base / "bin" / f"python{version}")
    return prefix / "bin" / "python"


def test_an_installation_is_one_tree_that_packages_go_into(tmp_path: Path) -> None:
    """pyenv, conda and uv install so."""
    python = interpreter(tmp_path / "3.12.1")
    found = discover(str(python))
    assert (found.version, found.layered, found.trees) == ("3.12", tmp_path / "3.12.1", ())
    assert found.site_packages == tmp_path / "3.12.1" / "lib" / "python3.12" / "site-packages"


def test_a_virtual_environment_needs_its_base_as_well(tmp_path: Path) -> None:
    """Packages go into the former; the latter is only read."""
    interpreter(tmp_path / "base")
    found = discover(str(virtual_environment(tmp_path / "venv", tmp_path / "base")))
    assert (found.layered, found.trees) == (tmp_path / "venv", (tmp_path / "base",))


def test_the_systems_python_is_not_layered() -> None:
    """/usr is shown whole, read-only; pip then installs into the home."""
    python = "/usr/bin/python3"
    if not Path(python).exists():
        pytest.skip("there is no /usr/bin/python3")
    found = discover(python)
    assert (found.layered, found.site_packages, found.trees) == (None, None, ())


def test_a_virtual_environment_of_the_systems_python_is(tmp_path: Path) -> None:
    """Its base is shown anyway."""
    if not Path("/usr/bin/python3").exists():
        pytest.skip("there is no /usr/bin/python3")
    version = Path("/usr/bin/python3").resolve().name.removeprefix("python")
    found = discover(str(virtual_environment(tmp_path / "venv", Path("/usr"), version)))
    assert (found.layered, found.trees) == (tmp_path / "venv", ())


def test_a_home_given_by_a_link_is_one_of_its_names(tmp_path: Path) -> None:
    """The interpreter finds its library by the path in pyvenv.cfg, so the guest needs the link."""
    interpreter(tmp_path / "3.12.1")
    (tmp_path / "3.12").symlink_to("3.12.1")
    home = tmp_path / "3.12" / "bin"
    found = discover(str(virtual_environment(tmp_path / "venv", tmp_path / "3.12.1", home=home)))
    assert found.trees == (tmp_path / "3.12.1",)
    assert home in found.names


def test_an_installation_that_shares_its_prefix_shows_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """~/.local holds keys and histories too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    local = tmp_path / ".local"
    python = interpreter(local)
    (local / "share" / "keyrings").mkdir(parents=True)
    found = discover(str(python))
    assert found.layered == local / "lib" / "python3.12"
    assert found.trees == (local / "bin",)
    assert found.site_packages == local / "lib" / "python3.12" / "site-packages"


def test_a_script_that_starts_an_interpreter_is_refused_with_the_cure(tmp_path: Path) -> None:
    """pyenv's shims are such; inside, what they look for is missing."""
    shim = tmp_path / "python"
    shim.write_text("#!/bin/sh\nexec pyenv exec python\n")
    shim.chmod(0o755)
    with pytest.raises(InvalidRequestError, match="script") as raised:
        discover(str(shim))
    assert "sys.executable" in raised.value.hint


def test_nothing_is_executed(tmp_path: Path) -> None:
    """A guest could have written the interpreter: what would run on the host if it were run does not."""
    ran = tmp_path / "ran"
    prefix = tmp_path / "evil"
    interpreter(prefix)
    (prefix / "lib" / "python3.12" / "sitecustomize.py").write_text(f"open({str(ran)!r}, 'w')")
    shutil.copy(Path(sys.executable).resolve(), prefix / "bin" / "python3.12")
    discover(str(prefix / "bin" / "python3.12"))
    assert not ran.exists()


@pytest.mark.parametrize("python", ["python3", "./python", "/nowhere/python", "/etc", "/etc/passwd"])
def test_what_is_no_interpreter_is_refused(python: str) -> None:
    """With the way to find out the right path."""
    with pytest.raises(InvalidRequestError) as raised:
        discover(python)
    assert raised.value.hint


def test_a_program_that_is_not_python_is_refused() -> None:
    """Even where a standard library lies beside it."""
    with pytest.raises(InvalidRequestError, match="not a CPython"):
        discover("/bin/true")


def test_this_very_environment_is_found() -> None:
    """The interpreter that runs the tests."""
    found = discover(sys.executable)
    assert found.version == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert found.layered is None or str(found.layered) == str(Path(sys.prefix).resolve())
