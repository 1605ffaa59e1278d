"""Kernelspec configuration, a notebook's choice, and the spec that comes of both."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from warmcell.kernel_provisioner.provisioner import WarmcellProvisioner
from warmcell.kernel_provisioner.wishes import Wishes, notebook_of, parse_size, read_choice
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import DEFAULT_PRELOAD, GIB, SandboxSpec, Workspace


def spec(config: dict[str, Any] | None = None, environ: dict[str, str] | None = None) -> SandboxSpec:
    return Wishes.from_json(config or {}).spec(folder="/folder", environ=environ or {})


def test_nothing_configured_is_the_engines_default() -> None:
    """Without configuration a kernel gets this Python, its folder, and nothing else."""
    assert spec() == SandboxSpec(python=sys.executable, workspace=Workspace(path="/folder"), preload=DEFAULT_PRELOAD)


def test_every_configured_field_reaches_the_spec() -> None:
    """No trait is read and then left out."""
    found = spec(
        {
            "backend": "process",
            "python": "/opt/python",
            "image": "analysis",
            "preload": [],
            "template": "t",
            "warmup": "import numpy; numpy.ones(2)",
            "network": "host",
            "workspace": "ro",
            "home": "persistent",
            "memory": "8GiB",
            "cpus": 2,
            "pids": 100,
            "gpu": ["H100", "A100"],
            "mounts": ["/data:/mnt:rw"],
            "env": {"A": "1"},
        }
    )
    assert found.to_json() == {
        "egress": None,
        "umask": None,
        "user": "",
        "backend": "process",
        "python": "/opt/python",
        "image": "analysis",
        "preload": [],
        "template": "t",
        "warmup": "import numpy; numpy.ones(2)",
        "network": "host",
        "workspace": {"path": "/folder", "mode": "ro"},
        "home": "persistent",
        "limits": {**spec().limits.to_json(), "memory_bytes": 8 * GIB, "cpus": 2.0, "pids": 100},
        "gpu": ["H100", "A100"],
        "mounts": [{"source": "/data", "target": "/mnt", "mode": "rw"}],
        "env": {"A": "1"},
    }


def test_traits_and_wishes_are_the_same() -> None:
    """What a kernelspec may configure is listed once for Jupyter and once for the launcher, alike."""
    traits = {name for name in WarmcellProvisioner.class_own_traits(config=True)}
    assert traits == set(Wishes.names())
    assert all(trait.help for trait in WarmcellProvisioner.class_own_traits(config=True).values())


def test_only_allowed_variables_are_taken_along() -> None:
    """The launching environment may hold tokens; a kernel gets what is named, and language and time zone."""
    environ = {"SECRET": "s", "A": "1", "B": "2", "LANG": "de_DE.UTF-8", "TZ": "UTC"}
    assert spec({"env": ["A", "MISSING"]}, environ).env == {"A": "1", "LANG": "de_DE.UTF-8", "TZ": "UTC"}
    assert spec({"env": {"TZ": "Europe/Berlin"}}, environ).env == {"LANG": "de_DE.UTF-8", "TZ": "Europe/Berlin"}


@pytest.mark.parametrize(
    ("wish", "mount"),
    [
        ("/data", ("/data", "", "ro")),
        ("/data:rw", ("/data", "", "rw")),
        ("/data:/mnt", ("/data", "/mnt", "ro")),
        ({"source": "/data", "mode": "rw"}, ("/data", "", "rw")),
    ],
)
def test_forms_of_a_mount(wish: object, mount: tuple[str, str, str]) -> None:
    """A mount is written as for containers, read-only unless it says otherwise."""
    (found,) = spec({"mounts": [wish]}).mounts
    assert (found.source, found.target, found.mode) == mount


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [(None, None), ("", None), (1000, 1000), ("8GiB", 8 * GIB), ("1.5G", 3 * GIB // 2), ("512 MiB", GIB // 2)],
)
def test_amounts_of_memory(size: str | int | None, bytes_: int | None) -> None:
    """As people write them."""
    assert parse_size(size) == bytes_


@pytest.mark.parametrize(
    "config",
    [
        {"memory": "much"},
        {"memory": "-1G"},
        {"network": "wifi"},
        {"workspace": "rwx"},
        {"home": "sweet"},
        {"mounts": ["/a:/b:/c"]},
        {"mounts": [{"from": "/a"}]},
        {"gpu": 1},
        {"preload": "torch"},
        {"wish": 1},
    ],
)
def test_a_wish_of_the_wrong_form_is_refused_with_the_cure(config: dict[str, Any]) -> None:
    """One clear error each, before anything is asked of the keeper."""
    with pytest.raises(InvalidRequestError) as caught:
        spec(config)
    assert caught.value.hint


def test_a_notebooks_choice_goes_over_the_kernelspec() -> None:
    """Of what a notebook may choose; mounts, variables and backend it may not."""
    wishes = Wishes.from_json({"memory": "1GiB", "gpu": "A100", "network": "none"})
    choice = {"memory": "2GiB", "gpu": None, "mounts": ["/"], "env": ["SECRET"], "backend": "process", "later": 1}
    found = wishes.chosen(choice, source="here").spec(folder="/folder", environ={"SECRET": "s"})
    assert found.limits.memory_bytes == 2 * GIB
    assert (found.gpu, found.mounts, dict(found.env), found.backend) == (None, (), {}, "auto")


@pytest.mark.parametrize(("network", "left"), [("host", {}), ("none", {"network": "none"}), (["host"], {})])
def test_a_file_cannot_open_its_own_network(tmp_path: Path, network: object, left: dict[str, str]) -> None:
    """A downloaded notebook may ask for less network, never for more; that takes a click."""
    notebook = tmp_path / "downloaded.ipynb"
    notebook.write_text(json.dumps({"metadata": {"warmcell": {"network": network, "gpu": "A100"}}}))
    assert read_choice(str(notebook)) == {"gpu": "A100", **left}


def test_a_choice_may_say_memory_as_the_page_does() -> None:
    """The picker sends limits in bytes."""
    assert Wishes().chosen({"limits": {"memory_bytes": GIB}}, source="").memory == GIB


def test_a_bad_choice_says_where_it_stands() -> None:
    """The notebook is named, so that its author can find it."""
    with pytest.raises(InvalidRequestError, match=r"metadata.warmcell of /n.ipynb: gpu must be") as caught:
        Wishes().chosen({"gpu": 7}, source="metadata.warmcell of /n.ipynb")
    assert "notebook's metadata" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "notebook"),
    [("/w/a.ipynb", "/w/a.ipynb"), ("a.ipynb", None), ("/w/console-1", None), ("", None)],
)
def test_which_session_is_a_notebook(name: str, notebook: str | None) -> None:
    """Jupyter's server names the session of consoles and files too."""
    assert notebook_of({"JPY_SESSION_NAME": name}) == notebook
    assert notebook_of({}) is None


@pytest.mark.parametrize(
    "content",
    [None, "", "[]", "{", '{"metadata": {}}', '{"metadata": {"warmcell": []}}', "[" * 100_000],
)
def test_a_notebook_without_a_choice_chooses_nothing(tmp_path: Path, content: str | None) -> None:
    """A new, an empty or a broken file is no reason not to start."""
    path = tmp_path / "a.ipynb"
    if content is not None:
        path.write_text(content)
    assert read_choice(str(path)) == {}


def test_a_notebooks_choice_is_read_from_its_file(tmp_path: Path) -> None:
    """`metadata.warmcell`, as the page writes it."""
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"metadata": {"warmcell": {"gpu": "A100"}}, "cells": []}))
    assert read_choice(str(path)) == {"gpu": "A100"}


def test_a_notebooks_defaults_of_remote_cells_reach_its_kernel() -> None:
    """As a variable of its environment, which the magic reads."""
    found = Wishes().chosen({"remote": {"gpu": "A100", "n": 4}}, source="").spec(folder="/folder", environ={})
    assert json.loads(found.env["WARMCELL_REMOTE"]) == {"gpu": "A100", "n": 4}
    assert "WARMCELL_REMOTE" not in Wishes().spec(folder="/folder", environ={}).env


def test_hosts_can_be_named_in_place_of_a_network() -> None:
    """A list, or a policy; the sandbox then has no network of its own. Secrets have no place there."""
    for network in (["pypi.org"], {"allow": ["pypi.org"]}):
        found = spec({"network": network})
        assert found.network == "none"
        assert found.egress is not None
        assert found.egress.allow == ("pypi.org",)
    with pytest.raises(InvalidRequestError, match="secrets"):
        spec({"network": {"headers": {"a.example": {"X": "y"}}}})


def test_a_notebooks_file_opens_no_host_by_itself(tmp_path: Path) -> None:
    """As it opens no network: the page offers that, and somebody clicks."""
    notebook = tmp_path / "x.ipynb"
    notebook.write_text(json.dumps({"metadata": {"warmcell": {"gpu": "any", "network": ["evil.example"]}}}))
    assert dict(read_choice(str(notebook))) == {"gpu": "any"}
