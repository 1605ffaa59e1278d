"""Modules of a notebook's folder, as they go to ranks and are loaded there."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from warmcell.sandbox.guest import modules


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path; what is loaded from it is forgotten afterwards."""
    before, finders = set(sys.modules), list(sys.meta_path)
    installed = [entry for entry in sys.path if modules._is_installed(os.path.realpath(entry))]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *installed])
    monkeypatch.setattr(modules, "_were", {})
    monkeypatch.setattr(modules, "_taken", {})
    monkeypatch.setattr(modules, "_sources", {})
    yield tmp_path
    sys.meta_path[:] = finders
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, **sources: str) -> dict[str, tuple[str, str]]:
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return {name: (str(folder / f"{name}.py"), source) for name, source in sources.items()}


def test_what_only_the_cell_imports_goes_with_what_that_imports(folder: Path) -> None:
    """Also packages, modules beside it, and such as are imported late; nothing that is elsewhere, and nothing runs."""
    write(folder, wc_top="import json, numpy, wc_beside\nraise SystemExit", wc_beside="def f():\n    import wc_late")
    write(folder, wc_late="x = 1", wc_unused="", wc_broken="def")
    (folder / "wc_pack" / "inner").mkdir(parents=True)
    (folder / "wc_pack" / "__init__.py").write_text("from . import one\n")
    (folder / "wc_pack" / "one.py").write_text("from .inner import two\n")
    (folder / "wc_pack" / "inner" / "__init__.py").write_text("from ..three import x as y\n")
    (folder / "wc_pack" / "inner" / "two.py").write_text("a = 1\n")
    (folder / "wc_pack" / "three.py").write_text("x = 1\n")
    given = modules.give(str(folder), ["wc_top", "wc_pack", "wc_broken", "wc_missing.x", "os.path"])
    assert [name for name in given if name.startswith("wc_")] == [
        *("wc_beside", "wc_broken", "wc_late"),
        *("wc_pack", "wc_pack.inner", "wc_pack.inner.two", "wc_pack.one", "wc_pack.three", "wc_top"),
    ]
    assert not any(name.startswith("wc_") for name in sys.modules)


def test_modules_that_import_each_other_are_loaded_again_in_some_order(folder: Path) -> None:
    """The first needs what is new in the last; what was loaded and never told of counts as old."""
    import importlib

    write(folder, wc_a="x = 1\n", wc_b="y = 1\n")
    a = importlib.import_module("wc_a")
    importlib.import_module("wc_b")
    modules.take(write(folder, wc_a="from wc_b import new\nx = new\n", wc_b="new = 2\n"))
    assert a.x == 2


def test_a_module_that_is_broken_stays_as_it_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, and stands in nobody else's way; when it is mended it is loaded again."""
    import importlib

    write(folder, wc_good="x = 1\n", wc_bad="y = 1\n")
    good, bad = importlib.import_module("wc_good"), importlib.import_module("wc_bad")
    modules.take(write(folder, wc_good="x = 2\n", wc_bad="y = \n"))
    assert (good.x, bad.y) == (2, 1)
    assert "The module wc_bad could not be loaded again: SyntaxError" in capsys.readouterr().err
    modules.take(write(folder, wc_good="x = 2\n", wc_bad="y = 3\n"))
    assert (good.x, bad.y) == (2, 3)


def test_a_module_that_takes_the_place_of_another_is_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder's instead of one that is elsewhere, and the other way round; what has stayed is not looked at."""
    written = write(folder, wc_name="x = 1")
    monkeypatch.setitem(sys.modules, "wc_name", sys.modules["json"])
    assert "wc_name" not in modules.give(str(folder))
    del sys.modules["wc_name"]
    own = importlib.import_module("wc_name")
    assert modules.give(str(folder)) == written
    looked: list[str] = []
    monkeypatch.setattr(modules, "_is_of", lambda name, module, folder: looked.append(name))
    assert (modules.give(str(folder)), looked) == (written, [])
    monkeypatch.setitem(sys.modules, "wc_name", sys.modules["json"])
    assert (modules.give(str(folder)), looked) == ({}, ["wc_name"])
    assert own.x == 1


def test_modules_of_folders_that_the_notebook_has_added_are_its_own(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Wherever they are, also once it is elsewhere itself; those of environments are not."""
    other = tmp_path_factory.mktemp("other")
    written = {**write(folder, wc_here="x = 1"), **write(other, wc_there="y = 1")}
    sys.path.append(str(other))
    importlib.import_module("wc_here"), importlib.import_module("wc_there"), importlib.import_module("attrs")
    assert modules.give(str(folder)) == written
    assert modules.give(str(other)) == written
    write(other, wc_late="z = 1")
    assert "wc_late" in modules.give(str(folder), ["wc_late"])


def test_modules_are_looked_up_once_however_many_folders_there_are(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two thousand modules each look at the disk counts; what is known of folders that were left is let go of."""
    sys.path += [str(tmp_path_factory.mktemp("more")) for _ in range(20)]
    places = [str(tmp_path_factory.mktemp("next")) for _ in range(3)]
    looks: list[str] = []
    realpath = os.path.realpath

    def looked(path: str) -> str:
        looks.append(path)
        return realpath(path)

    monkeypatch.setattr(os.path, "realpath", looked)
    for place in places:
        looks.clear()
        assert modules.give(place) == {}
        assert len(looks) < 2 * len(sys.modules) + 500
    assert len(modules._looked) == 1


def test_modules_of_environments_are_not_the_notebooks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also where packages were put into a folder of their own, as `pip install --target` does."""
    target = tmp_path_factory.mktemp("target")
    write(target, wc_installed="x = 1")
    (target / "wc_installed-1.0.dist-info").mkdir()
    sys.path.append(str(target))
    importlib.import_module("wc_installed")
    assert modules.give(str(folder), ["wc_installed"]) == {}


def test_a_module_is_loaded_again_with_those_that_import_it(folder: Path) -> None:
    """Each behind what it imports; what has no part in it stays as it is."""
    sources = {
        "wc_z": "n = 1\n",
        "wc_b": "from wc_z import n\n",
        "wc_a": "import wc_b\nn = wc_b.n\n",
        "wc_c": "o = []\n",
    }
    modules.take(write(folder, **sources))
    loaded = {name: importlib.import_module(name) for name in sources}
    kept = loaded["wc_c"].o
    modules.take(write(folder, **{**sources, "wc_z": "n = 2\n"}))
    assert (loaded["wc_b"].n, loaded["wc_a"].n) == (2, 2)
    assert loaded["wc_c"].o is kept


def test_a_package_without_a_file_of_its_own_is_found(folder: Path) -> None:
    """Where nobody has its folder."""
    file = folder / "deep.py"
    modules.take({"wc_spread.inner.deep": (str(file), "x = 5\n")})
    assert importlib.import_module("wc_spread.inner.deep").x == 5
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("wc_spread.other")
