"""Modules and files of the notebook's own, in ranks: as they are here, wherever the notebook is."""

from pathlib import Path

import pytest

from tests.integration.process.guest import Kernel
from tests.remote.conftest import body_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_rank_is_where_the_notebook_is(kernel: Kernel, folder: Path) -> None:
    """Relative paths lead to the same files, also after `os.chdir`; what the notebook has imported stays known."""
    (folder / "inner").mkdir()
    (folder / "inner" / "data.csv").write_text("inside")
    (folder / "wc_beside.py").write_text("def f():\n    return 'beside'\n")
    await kernel.run("import os, sys; sys.path.insert(0, ''); import wc_beside")
    assert body_of(await kernel.run("%%remote\nprint(wc_beside.f())")) == "beside\n"
    await kernel.run("os.chdir('inner')")
    output = await kernel.run("%%remote\nprint(open('data.csv').read(), wc_beside.f())")
    assert body_of(output) == "inside beside\n", output
    assert body_of(await kernel.run("%%remote\nos.chdir('/')")) == ""  # Its own, until the notebook goes on.
    assert body_of(await kernel.run("%%remote\nprint(os.getcwd())")) == "/\n"
    await kernel.run("os.chdir('..')")
    assert body_of(await kernel.run("%%remote\nprint(os.listdir('inner'))")) == "['data.csv']\n"


async def test_modules_of_another_folder_go_along(kernel: Kernel, tmp_path: Path) -> None:
    """One that the notebook has added to `sys.path`; objects of a class that was loaded again are of the new one."""
    (tmp_path / "wc_far.py").write_text("class Kind:\n    n = 1\ndef f():\n    return 1\n")
    await kernel.run(
        f"import sys, importlib; sys.path.append({str(tmp_path)!r})\nimport wc_far\nfrom wc_far import f as far\n"
        "thing = wc_far.Kind()"
    )
    told = "%%remote\nprint(thing.n, isinstance(thing, wc_far.Kind), far(), wc_far.f())"
    assert body_of(await kernel.run(told)) == "1 True 1 1\n"
    (tmp_path / "wc_far.py").write_text("class Kind:\n    n = 'two'\ndef f():\n    return 2\n")
    await kernel.run("importlib.reload(wc_far); thing = wc_far.Kind(); far = wc_far.f")
    assert body_of(await kernel.run(told)) == "two True 2 2\n"


async def test_what_was_made_of_an_object_there_stays_when_another_module_goes_along(
    kernel: Kernel, folder: Path
) -> None:
    """Also where the module that a cell imports, or that is imported here, has not been there before."""
    (folder / "wc_net.py").write_text("class Net:\n    steps = 0\n")
    (folder / "wc_steps.py").write_text("def step(net):\n    net.steps += 1\n")
    (folder / "wc_plots.py").write_text("")
    await kernel.run("import importlib, sys; importlib.invalidate_caches(); sys.path.insert(0, '')\nimport wc_net")
    await kernel.run("net = wc_net.Net()")
    step = "%%remote\nimport wc_steps\nwc_steps.step(net)\nprint(net.steps)"
    assert body_of(await kernel.run(step)) == "1\n"
    assert body_of(await kernel.run("%%remote\nprint(net.steps)")) == "1\n"
    assert body_of(await kernel.run(step)) == "2\n"
    await kernel.run("import wc_plots")
    assert body_of(await kernel.run("%%remote\nprint(net.steps)")) == "2\n"
    (folder / "wc_plots.py").write_text("shown = True\n")
    (folder / "wc_steps.py").write_text("def step(net):\n    net.steps += 10\n")
    assert body_of(await kernel.run(step)) == "12\n"
    await kernel.run("importlib.reload(wc_plots)")
    assert body_of(await kernel.run("%%remote\nprint(net.steps, wc_plots.shown)")) == "12 True\n"


async def test_what_is_below_a_package_comes_with_it(kernel: Kernel, folder: Path) -> None:
    """`import a.b` here is enough to read `a.b.c` there, of the folder's packages and of installed ones."""
    (folder / "wc_pack" / "deep").mkdir(parents=True)
    (folder / "wc_pack" / "__init__.py").write_text("")
    (folder / "wc_pack" / "deep" / "own.py").write_text("x = 7\n")
    await kernel.run("import importlib; importlib.invalidate_caches()\nimport wc_pack.deep.own\nimport xml.dom.minidom")
    cell = "%%remote session=fresh\nprint(wc_pack.deep.own.x, xml.dom.minidom.parseString('<a/>').firstChild.tagName)"
    output = await kernel.run(cell)
    assert body_of(output) == "7 a\n", output
    await kernel.run("%remote close fresh")
