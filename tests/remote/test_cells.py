"""Conformance: a cell by `%%remote` does what it does here: results, output, and the type and text of its error.

`cells/*.txt` have a cell after each `=== title`: what the notebook did before it, `---`, the cell, and after a further
`---` what is to be equal afterwards.
"""

import ast
import builtins
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.integration.process.guest import Kernel, Output
from tests.remote.conftest import body_of

CLEAR = """
_KEPT = {"In", "Out", "get_ipython", "exit", "quit", "open"}
def _clear():
    names = globals()
    for name in [name for name in names if name not in _KEPT and not name.startswith("_")]:
        del names[name]
_clear()
"""
"""As `%reset`, which takes long where many modules are loaded."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Cell(NamedTuple):
    """One case."""

    title: str
    before: str
    code: str
    equal: str

    @property
    def brings_back(self) -> str:
        """The names in what is to be equal, but those of classes of the notebook: objects come back as its own."""
        names = [node.id for node in ast.walk(ast.parse(self.equal)) if isinstance(node, ast.Name)]
        classes = re.findall(r"^class (\w+)", self.before, flags=re.MULTILINE)
        return ",".join(name for name in dict.fromkeys(names) if not hasattr(builtins, name) and name not in classes)


def cells() -> list[Cell]:
    found = []
    for path in sorted((Path(__file__).parent / "cells").glob("*.txt")):
        for part in re.split(r"^=== ", path.read_text(), flags=re.MULTILINE)[1:]:
            title, _, rest = part.partition("\n")
            before, _, rest = ("\n" + rest).partition("\n---\n")
            code, _, equal = rest.partition("\n--- ")
            found.append(Cell(title, before.strip("\n"), code.rstrip("\n"), equal.strip()))
    return found


def seen(output: Output) -> dict[str, object]:
    """What its reader sees of a cell, less addresses and the names of temporary files."""
    shown = [data.get("text/plain", "") for data in output.data] + ([output.result] if output.result else [])
    error = re.sub(r"\(\d+\.py, line \d+\)|on line \d+", "", output.error)
    text, stderr = (re.sub(r"line \d+, in |In\[\d+\]|File .*?:\d+", "", said) for said in (output.text, output.stderr))
    return {"status": output.status, "text": text, "stderr": stderr, "shown": shown, "error": error}


async def test_there_are_many() -> None:
    """At least sixty, each with a title of its own."""
    titles = [cell.title for cell in cells()]
    assert len(titles) == len(set(titles)) >= 60


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.title.replace(" ", "-"))
async def test_a_remote_cell_does_what_it_does_here(cell: Cell, kernel: Kernel, local: Kernel) -> None:
    """Equal output, displays, error and values."""
    for one in (kernel, local):
        await one.run(CLEAR)
        assert (await one.run(cell.before)).status == "ok"
    assert (await kernel.run("%%remote\n_clear()")).status == "ok"
    here = await local.run(cell.code)
    get = f" get={cell.brings_back}" if cell.brings_back else ""
    there = await kernel.run(f"%%remote{get}\n{cell.code}")
    there.text = body_of(there)
    assert seen(there) == seen(here)
    if cell.equal:
        what = f"print(repr(({cell.equal},)))"
        values = [await one.run(what) for one in (kernel, local)]
        assert values[0].text == values[1].text
        assert values[0].status == "ok", values
