"""A user watches four ranks: progress, a failure, the stop button, and a cell that goes on while the page is closed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.accessible import assert_accessible
from tests.browser.conftest import browser
from tests.browser.lab import Lab
from tests.browser.notebook import CELL_TIMEOUT_MS, Notebook
from tests.leaks import Places, own_places

pytestmark = [pytest.mark.browser, pytest.mark.bubblewrap]

SIMULATED = [{"name": "A100-SXM4-80GB", "memory": "80GiB", "count": 4}]

TRAIN = """\
%%remote gpu=A100 n=4
import os, pathlib, time
from IPython.display import Markdown
from tqdm.auto import tqdm

rank = int(os.environ["RANK"])
print(f"learning rate {10.0 ** -rank:g}")
for step in tqdm(range(100), desc="epoch 1", mininterval=0, miniters=1):
    while rank and step == 25 + 20 * rank and not pathlib.Path(f"go-on-{rank}").exists():
        time.sleep(0.05)
    if rank == 2 and step == 80:
        raise ValueError("the loss is NaN in step 80")
Markdown(f"best loss: **{0.31 + rank}**")
"""
STOP = "%%remote gpu=A100 n=4\nprint('sleeps')\ntime.sleep(1000)"
LONG = """\
%%remote gpu=A100 n=4 detach as=job
for step in tqdm(range(10), desc="goes on", mininterval=0, miniters=1):
    while step == 5 and not pathlib.Path("finish").exists():
        time.sleep(0.05)
rank * 11
"""
CELLS = (TRAIN, STOP, LONG, "%remote attach", "job.result()")


@dataclass
class Shown:
    """The ranks below one cell."""

    cell: Locator

    @classmethod
    def below(cls, page: Page, number: int) -> "Shown":
        """Those of a notebook's cell, once they are drawn."""
        shown = cls(page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell").nth(number))
        expect(shown.cell.locator(".wc-Rank")).to_have_count(4, timeout=CELL_TIMEOUT_MS)
        return shown

    def rank(self, number: int) -> Locator:
        """One of them."""
        return self.cell.locator(f".wc-Rank[data-rank='{number}']")

    def states(self, *states: str) -> None:
        """Wait until they are in these states."""
        for number, state in enumerate(states):
            expect(self.rank(number)).to_have_attribute("data-state", state, timeout=CELL_TIMEOUT_MS)

    def progress(self, *shares: str) -> None:
        """Wait until their bars are there."""
        for number, share in enumerate(shares):
            expect(self.rank(number).locator("progress")).to_have_attribute("value", share, timeout=CELL_TIMEOUT_MS)


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    """One set of directories for the module."""
    with own_places() as made:
        yield made


@pytest.fixture(scope="module")
def lab(places: Places) -> Iterator[Lab]:
    """A JupyterLab on a machine with four GPUs, all simulated."""
    with Lab(places, settings={"prepared": 0, "simulated_gpus": SIMULATED}) as started:
        started.kernelspec("plain", "Plain", {"preload": [], "template": "plain"})
        started.notebook("train.ipynb", *CELLS, kernel="plain", display_name="Plain")
        yield started


@pytest.fixture(scope="module")
def page(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for the module."""
    with browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def notebook(lab: Lab, page: Page) -> Notebook:
    """The notebook, whose kernel runs."""
    opened = Notebook.open(page, lab, "train.ipynb")
    opened.wait_ready("cold start")
    return opened


def test_ranks_are_watched_until_one_fails(lab: Lab, notebook: Notebook, pictures: Path) -> None:
    """Each has its bar, which moves; what is folded stays folded; what a failure leaves behind is kept."""
    notebook.run(0, expected="Remote: sandbox")
    shown = Shown.below(notebook.page, 0)
    shown.progress("1.0000", "0.4500", "0.6500", "0.8500")
    shown.states("done", "runs", "runs", "runs")
    expect(shown.rank(0).locator("strong")).to_have_text("0.31")
    expect(shown.rank(1)).to_contain_text("learning rate 0.1")
    expect(shown.rank(1).locator(".wc-Rank-memory")).to_contain_text("MiB", timeout=CELL_TIMEOUT_MS)
    shown.rank(3).locator("summary").click()
    expect(shown.rank(3)).not_to_have_attribute("open", re.compile(""))
    (lab.folder / "go-on-2").touch()

    shown.states("done", "stopped", "failed", "stopped")
    expect(shown.rank(2).locator(".wc-Rank-error")).to_have_text("ValueError: the loss is NaN in step 80")
    expect(shown.rank(2).locator("progress")).to_have_attribute("value", "0.8000")
    expect(shown.rank(1)).to_contain_text("learning rate 0.1")
    expect(shown.rank(3)).not_to_have_attribute("open", re.compile(""))
    expect(shown.rank(3)).to_contain_text("learning rate 0.001")
    summary = shown.cell.locator(".wc-Ranks-summary")
    expect(summary).to_contain_text("4 ranks: 2 stopped, 1 failed, 1 done")
    expect(summary).to_contain_text("GPU-seconds")
    expect(shown.cell).to_contain_text("Rank 2:")
    assert_accessible(notebook.page, ".wc-Ranks")
    shown.cell.locator(".jp-Cell-outputWrapper").screenshot(path=pictures / "ranks.png")

    shown.cell.get_by_role("button", name="Fold all").click()
    expect(shown.cell.locator(".wc-Rank[open]")).to_have_count(0)
    shown.cell.get_by_role("button", name="Unfold all").press("Enter")
    expect(shown.cell.locator(".wc-Rank[open]")).to_have_count(4)


def test_the_stop_button_stops_all_ranks(notebook: Notebook) -> None:
    """They say that they were stopped, and what they had printed is kept."""
    notebook.run(1, expected="Remote: sandbox")
    shown = Shown.below(notebook.page, 1)
    for number in range(4):
        expect(shown.rank(number)).to_contain_text("sleeps", timeout=CELL_TIMEOUT_MS)
    notebook.page.get_by_role("button", name="Interrupt the kernel").click()
    shown.states(*4 * ["stopped"])
    expect(shown.rank(3)).to_contain_text("sleeps")
    expect(shown.cell).to_contain_text("KeyboardInterrupt")


def test_a_detached_cell_outlives_the_page(lab: Lab, notebook: Notebook, pictures: Path) -> None:
    """After a refresh the first cell is drawn as it was, the detached one can be watched, and its value is there."""
    notebook.run(2, expected="runs on its own")
    lab.choose("@jupyterlab/apputils-extension:themes", {"theme": "JupyterLab Dark"})
    notebook.page.keyboard.press("Control+s")
    expect(notebook.page.locator(".jp-NotebookPanel .jp-mod-dirty, .lm-TabBar-tab.jp-mod-dirty")).to_have_count(0)
    notebook.reload(lab)

    old = Shown.below(notebook.page, 0)
    old.states("done", "stopped", "failed", "stopped")
    notebook.run(3, expected="")
    shown = Shown.below(notebook.page, 3)
    shown.progress(*4 * ["0.5000"])
    shown.states(*4 * ["runs"])
    assert_accessible(notebook.page, ".wc-Ranks")
    shown.cell.locator(".jp-Cell-outputWrapper").screenshot(path=pictures / "ranks-dark.png")
    (lab.folder / "finish").touch()
    shown.states(*4 * ["done"])
    notebook.run(4, expected="[0, 11, 22, 33]")
