"""Kernelspecs whose kernels Warmcell starts, and whether their environments are there."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.leaks import Places
from warmcell.extension.environments import kernelspecs


def make_spec(places: Places, name: str, *, provisioner: str = "warmcell", **config: Any) -> None:
    directory = places.root / "jupyter" / "data" / "kernels" / name
    directory.mkdir(parents=True)
    metadata = {"kernel_provisioner": {"provisioner_name": provisioner, "config": config}}
    spec = {"argv": ["python"], "display_name": name.upper(), "language": "python", "metadata": metadata}
    (directory / "kernel.json").write_text(json.dumps(spec))


def make_environment(root: Path, *, ipykernel: bool, home: Path | None = None) -> str:
    python = root / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    python.chmod(0o755)
    packages = root / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    if ipykernel:
        (packages / "ipykernel").mkdir()
    if home is not None:
        (root / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = true\n")
    return str(python)


@pytest.fixture(autouse=True)
def only_own_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernelspec of the machine is seen, nor the one of this environment's ipykernel."""
    monkeypatch.setattr("jupyter_client.kernelspec.SYSTEM_JUPYTER_PATH", [])
    monkeypatch.setattr("jupyter_client.kernelspec.jupyter_path", lambda *sub: [])
    monkeypatch.setattr("jupyter_client.kernelspec.KernelSpecManager.ensure_native_kernel", False)


@pytest.fixture
def found(places: Places, monkeypatch: pytest.MonkeyPatch) -> Any:
    kernels = str(places.root / "jupyter" / "data" / "kernels")
    monkeypatch.setattr("jupyter_client.kernelspec.jupyter_path", lambda *sub: [kernels])
    return lambda: {spec.name: spec for spec in kernelspecs()}


def test_only_those_of_warmcell_are_listed(places: Places, found: Any) -> None:
    """Other provisioners' kernelspecs are none of our business."""
    make_spec(places, "ours", python=sys.executable)
    make_spec(places, "theirs", provisioner="local-provisioner")
    assert set(found()) == {"ours"}
    assert found()["ours"].display_name == "OURS"


def test_a_spec_without_an_interpreter_is_this_environments(places: Places, found: Any) -> None:
    """The kernelspec that comes with the package belongs to the Python that it is installed in."""
    make_spec(places, "warmcell")
    assert found()["warmcell"].python == sys.executable
    assert found()["warmcell"].ok


def test_an_environment_that_is_gone_is_told(places: Places, found: Any) -> None:
    """A deleted environment gives the command that removes its kernelspec."""
    make_spec(places, "gone", python="/nowhere/bin/python")
    spec = found()["gone"]
    assert not spec.ok
    assert "/nowhere/bin/python is not there" in spec.why
    assert "warmcell kernelspec remove gone" in spec.hint


def test_an_environment_without_ipykernel_is_told(places: Places, found: Any) -> None:
    """The one package that an environment needs is missed by name."""
    python = make_environment(places.root / "bare", ipykernel=False)
    make_spec(places, "bare", python=python)
    assert found()["bare"].hint == f"{python} -m pip install ipykernel"


def test_a_virtual_environment_may_have_it_from_its_base(places: Places, found: Any) -> None:
    """What the environment below it has counts."""
    make_environment(places.root / "base", ipykernel=True)
    python = make_environment(places.root / "venv", ipykernel=False, home=places.root / "base" / "bin")
    make_spec(places, "venv", python=python)
    assert found()["venv"].ok


def test_nothing_of_an_environment_is_run(places: Places, found: Any) -> None:
    """An interpreter that a sandbox could have written is looked at, never started on the host."""
    python = make_environment(places.root / "trap", ipykernel=True)
    Path(python).write_text(f"#!/bin/sh\ntouch {places.root}/sprung\n")
    make_spec(places, "trap", python=python)
    assert found()["trap"].ok
    assert not (places.root / "sprung").exists()
