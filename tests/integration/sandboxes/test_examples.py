"""The examples that use sandboxes run as they stand."""

import base64
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.lanes import TOP
from warmcell import Sandbox

pytestmark = [pytest.mark.bubblewrap]


def run(name: str, *arguments: str, cwd: Path | None = None) -> str:
    """What an example prints, as a user runs it; nothing of it is left."""
    argv = [sys.executable, str(TOP / "examples" / f"{name}.py"), *arguments]
    before = Sandbox.list()
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert {one.id for one in Sandbox.list()} <= {one.id for one in before}
    return done.stdout


@pytest.mark.criu
def test_rollouts_get_better_from_copies_of_the_best(at_home: None) -> None:
    """Two rounds of 16 copies each; the second does not end worse than the first; nothing is left of them."""
    said = run("rollouts")
    rounds = re.findall(r"^round \d: 16 copies in \d+ ms, best reward (-\d+\.\d+), worst", said, re.M)
    assert len(rounds) == 2
    assert [float(one) for one in rounds] == sorted(float(one) for one in rounds)
    assert "found [" in said


def test_a_tool_loop_mends_what_went_wrong(at_home: None, tmp_path: Path) -> None:
    """An error of a tool comes back to the model, whose answer has what its tools saw; its file is not one of ours."""
    *steps, answer = run("tool_loop", cwd=tmp_path).splitlines()
    calls = [line.partition(" ")[0] for line in steps if not line.startswith("  ")]
    assert calls == ["write_file", "run_python", "run_python", "run_python", "run_shell"]
    said = [line for line in steps if line.startswith("  -> ")]
    assert ["KeyError: 'price'" in line for line in said] == [False, False, True, False, False]
    assert answer == "The best month was June, with 420 euros."
    assert list(tmp_path.iterdir()) == []


def test_an_agent_over_mcp_leaves_a_notebook(at_home: None, tmp_path: Path) -> None:
    """Variables stay from cell to cell; one that fails has its error, the next one mends it, the last has a picture."""
    said = run("notebook_agent", "made.ipynb", cwd=tmp_path)
    assert re.findall(r"^\[(\d)\] (\w+)", said, re.M) == [("1", "ok"), ("2", "error"), ("3", "ok"), ("4", "ok")]
    notebook = nbformat.read(tmp_path / "made.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    first, failed, mended, drawn = [cell.outputs for cell in notebook.cells[1:]]
    assert first == []
    assert [(one.ename, one.evalue) for one in failed] == [("NameError", "name 'statistics' is not defined")]
    assert [one.text for one in mended] == ["10.0 on 365 days\n"]
    assert base64.b64decode(drawn[0].data["image/png"]).startswith(b"\x89PNG")


@pytest.mark.criu
@pytest.mark.parametrize("page", ["README.md", "docs/howto/agents.md"])
def test_the_snippets_that_people_copy_run(at_home: None, page: str) -> None:
    """The first lines on sandboxes of each page do what they say; two copies stand for eight."""
    block = re.search(r"```python\n(from warmcell import Sandbox\n.*?)```", (TOP / page).read_text(), re.S)
    assert block is not None
    code = block[1].replace("fork(8)", "fork(2)").replace("Sandbox()", "Sandbox(preload=(), tags={'page': 'yes'})")
    names: dict[str, object] = {}
    exec(compile(code, page, "exec"), names)
    copies = names["boxes"]
    assert isinstance(copies, list)
    assert [copy.run("x").text is not None for copy in copies] == [True, True]
    for copy in copies:
        copy.kill()
        copy.close()
    assert Sandbox.list(tags={"page": "yes"}) == []
