"""What importing the package costs and offers."""

import json
import subprocess
import sys
import tomllib

import pytest

from tests.lanes import TOP

HEAVY = (
    "IPython",
    "docker",
    "gpustat",
    "httpx",
    "jupyter_client",
    "jupyter_server",
    "pynvml",
    "torch",
    "tornado",
    "zmq",
)


def _loaded_by(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_is_cheap() -> None:
    """`import warmcell` loads none of the libraries that it will need later."""
    assert not _loaded_by("import warmcell") & set(HEAVY)


@pytest.mark.parametrize("module", ["warmcell.sandbox.service", "warmcell.extension.cli"])
def test_torch_is_never_imported_on_the_host(module: str) -> None:
    """Neither the engine nor the command line loads torch or a container library."""
    assert not _loaded_by(f"import {module}") & {"docker", "pynvml", "torch"}


def test_each_public_name_resolves() -> None:
    """Everything in `__all__` can be had, and asking for anything else is an AttributeError."""
    import warmcell

    assert all(getattr(warmcell, name) is not None for name in warmcell.__all__)
    assert set(warmcell.__all__) <= set(dir(warmcell))
    with pytest.raises(AttributeError, match="no attribute 'Sandwich'"):
        warmcell.Sandwich  # noqa: B018  (the look-up is the test)


def test_versions_agree() -> None:
    """The Python and the Node package carry one version."""
    python = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["version"]
    assert json.loads((TOP / "package.json").read_text())["version"] == python


def test_lock_file_names_no_registry() -> None:
    """yarn.lock and its configuration work with whichever registry the machine is set to."""
    for name in ("yarn.lock", ".yarnrc.yml"):
        assert "://" not in (TOP / name).read_text(), name
