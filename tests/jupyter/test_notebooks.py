"""Real notebooks in real sandboxes, through clients that know nothing of Warmcell."""

import asyncio
import base64
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from benchmarks.server import end_keeper
from tests.lanes import TOP
from tests.leaks import Places

KERNEL = "warmcell"
CELL_TIMEOUT_S = 120
PROGRAM_TIMEOUT_S = 180

pytestmark = pytest.mark.bubblewrap


@pytest.fixture
def folder(tmp_path: Path, places: Places) -> Iterator[Path]:
    """A copy of the examples; the keeper that was started for it ends with the test."""
    copy = tmp_path / "notebooks"
    shutil.copytree(TOP / "examples", copy, ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "marker").write_text("outside of the workspace")
    yield copy
    end_keeper(places)


async def executed(path: Path) -> NotebookNode:
    """The notebook with its outputs, as nbclient makes them."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, kernel_name=KERNEL, timeout=CELL_TIMEOUT_S, resources={"metadata": {"path": str(path.parent)}}
    )
    done: NotebookNode = await client.async_execute()
    return done


async def said(*module: str, cwd: Path, typed: str = "") -> str:
    """What a Python program says that is given these lines; it must end well."""
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *module),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=cwd,
    )
    try:
        answer, _ = await asyncio.wait_for(program.communicate(typed.encode()), PROGRAM_TIMEOUT_S)
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
    assert program.returncode == 0, answer.decode()
    return answer.decode()


def outputs(notebook: NotebookNode) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text(notebook: NotebookNode) -> str:
    """All that was printed, and the plain form of all results."""
    return "\n".join(
        output.text if output.output_type == "stream" else output.data["text/plain"] for output in outputs(notebook)
    )


def figures(notebook: NotebookNode) -> list[bytes]:
    found = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [base64.b64decode(figure) for figure in found]


def widgets(notebook: NotebookNode, model: str) -> list[dict[str, Any]]:
    """The final states of the notebook's widgets of one kind."""
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    return [one["state"] for one in states if one["model_name"] == model]


async def test_a_network_learns_to_read_digits(folder: Path) -> None:
    """A torch training loop reaches its accuracy, and its figures are in the notebook."""
    notebook = await executed(folder / "digits.ipynb")
    read_right = re.search(r"([\d.]+)% of 450 pictures", text(notebook))
    assert read_right is not None
    assert float(read_right[1]) > 95
    assert len(figures(notebook)) == 3
    assert all(figure.startswith(b"\x89PNG") and len(figure) > 2000 for figure in figures(notebook))


async def test_a_table_and_its_figures(folder: Path) -> None:
    """A notebook of pandas and matplotlib gives the tables and figures that they give outside."""
    notebook = await executed(folder / "daylight.ipynb")
    days = re.search(r"^2026-06-30 +(.+)$", text(notebook), re.M)
    assert days is not None
    assert [float(hours) for hours in days[1].split()] == [12.0, 13.9, 14.7, 16.5, 18.5, 24.0]
    assert len(figures(notebook)) == 2
    assert any("Tromsø" in output.data.get("text/html", "") for output in outputs(notebook) if "data" in output)


async def test_widgets_end_in_their_final_state(folder: Path) -> None:
    """The progress bar that the kernel moved is full, and the text beside it has the last estimate."""
    notebook = await executed(folder / "progress.ipynb")
    (bar,) = widgets(notebook, "IntProgressModel")
    assert (bar["value"], bar["max"], bar["bar_style"]) == (60, 60, "success")
    assert any("π ≈ 3.14" in html["value"] for html in widgets(notebook, "HTMLModel"))


async def test_the_first_steps(folder: Path) -> None:
    """What the first notebook shows is so: the folder and nothing else, no network, a cell in another sandbox."""
    notebook = await executed(folder / "first-steps.ipynb")
    said = text(notebook)
    assert str(sorted(path.name for path in folder.iterdir())) in said
    assert "summed in another sandbox" in said
    assert "tensor(45.)" in said


async def test_what_a_notebook_writes_is_in_its_folder(folder: Path) -> None:
    """Files of a cell are the user's, in the folder; a file beside the folder is not there for it."""
    code = "open('made', 'w').write('here'); import os; print(os.getcwd(), os.path.exists('../marker'))"
    path = folder / "writes.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
    notebook = await executed(path)
    assert text(notebook) == f"{folder} False\n"
    assert (folder / "made").read_text() == "here"
    assert (folder / "made").stat().st_uid == folder.stat().st_uid


async def test_papermill_runs_a_notebook_with_parameters(folder: Path) -> None:
    """Papermill puts its parameters into the notebook, runs it, and writes the result."""
    await said(
        *("papermill", "progress.ipynb", "done.ipynb", "--kernel", KERNEL, "--parameters", "BATCHES", "7"),
        *("--no-progress-bar",),
        cwd=folder,
    )
    notebook = nbformat.read(folder / "done.ipynb", as_version=4)
    assert all(cell.metadata.papermill.status == "completed" for cell in notebook.cells if cell.cell_type == "code")
    (bar,) = widgets(notebook, "IntProgressModel")
    assert (bar["value"], bar["max"]) == (7, 7)


async def test_a_file_is_run_and_its_kernel_ended_as_the_program_ends(folder: Path) -> None:
    """`jupyter run` ends its kernel when Python has no threads to give any more; it says nothing but the file's own."""
    (folder / "sum.py").write_text("print(40 + 2)")
    assert await said("jupyter_client.runapp", f"--kernel={KERNEL}", "sum.py", cwd=folder) == "42\n"


async def test_a_console_joins_a_running_kernel(folder: Path) -> None:
    """`jupyter console --existing` shares the variables of a kernel that runs, and leaves it running."""
    manager = AsyncKernelManager(kernel_name=KERNEL)
    await manager.start_kernel(cwd=str(folder))
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=CELL_TIMEOUT_S)
        await client.execute_interactive("x = 6", timeout=CELL_TIMEOUT_S)
        lines = "x *= 7\nprint('the answer is', x)\n"  # Then Ctrl-D: `exit` would end the kernel too.
        answer = await said(
            *("jupyter_console", "--existing", manager.connection_file),
            *("--simple-prompt", "--ZMQTerminalInteractiveShell.confirm_exit=False"),
            cwd=folder,
            typed=lines,
        )
        assert "the answer is 42" in answer
        reply = await client.execute_interactive("assert x == 42", timeout=CELL_TIMEOUT_S)
        assert reply["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)
