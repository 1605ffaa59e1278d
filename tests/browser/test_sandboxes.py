"""Sandboxes, the queue for GPUs, meters, starts and snapshots as the page shows them, with simulated GPUs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Locator, Page, ViewportSize, expect

from tests.browser.accessible import assert_accessible
from tests.browser.conftest import SIZE, browser
from tests.browser.lab import Lab
from tests.browser.notebook import CELL_TIMEOUT_MS, START_TIMEOUT_MS, Notebook
from tests.leaks import Places, own_places

pytestmark = [pytest.mark.browser, pytest.mark.bubblewrap, pytest.mark.criu]

CELLS = ("count = 0\nprint('begun')", "count += 1\nprint('count is', count)")
SERVE = """
import http.server, threading
PAGE = b'''<!doctype html><title>page</title><p role=status></p><p role=alert></p><script>
fetch('data?x=1').then(said => said.text()).then(text => {
  document.querySelector('[role=status]').textContent = `data: ${text}; origin ${window.origin}`;
});
let cookies = 'no cookies';
try { cookies = document.cookie; } catch {}
document.querySelector('[role=alert]').textContent = cookies;
</script>'''
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE if self.path == "/" else self.path.encode())
    def log_message(self, *about):
        pass
web = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Page)
threading.Thread(target=web.serve_forever, daemon=True).start()
print("serving")
"""
SIMULATED = [
    {"name": "A100-SXM4-80GB", "memory": "80GiB"},
    {"name": "T4", "memory": "16GiB", "used": "1GiB", "busy": 40},
]
WIDE: ViewportSize = {"width": 1600, "height": 720}
QUIET = ".Toastify { display: none }"
"""No notifications in pictures."""


class Desk:
    """One JupyterLab in one browser, for all tests of this module."""

    def __init__(self, lab: Lab, page: Page) -> None:
        self.lab = lab
        self.page = page

    def open(self, name: str) -> Notebook:
        """Open a notebook alone, with the list of what runs beside it."""
        notebook = Notebook.open(self.page, self.lab, name)
        self.page.get_by_role("tab", name=re.compile("^Running Terminals and Kernels")).click()
        return notebook

    def row(self, name: str) -> Locator:
        """What the list of sandboxes says of one."""
        title = self.page.get_by_text(name, exact=True)
        return self.page.locator(".wc-Sandboxes-row").filter(has=title)

    @property
    def toolbar(self) -> Locator:
        """That of the notebook in front."""
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-NotebookPanel-toolbar")

    def save(self, name: str) -> None:
        """Give the snapshot that is about to be saved a name."""
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_role("textbox").fill(name)
        dialog.get_by_role("button", name="Save").click()
        expect(self.page.get_by_text(f"Saved “{name}”").first).to_be_visible(timeout=START_TIMEOUT_MS)


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    """One set of directories for all tests of this module, in the place of one for each."""
    with own_places() as made:
        yield made


@pytest.fixture(scope="module")
def desk(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A JupyterLab with one A100 and one T4, both simulated."""
    with (
        Lab(places, settings={"prepared": 0, "simulated_gpus": SIMULATED, "gpu_shares": 2}) as lab,
        browser(tmp_path_factory.mktemp("browser") / "profile") as page,
    ):
        lab.kernelspec("plain", "Plain", {"preload": [], "template": "plain"})
        for name in ("train.ipynb", "rival.ipynb"):
            lab.notebook(name, *CELLS, kernel="plain", display_name="Plain", choice={"gpu": "A100"})
        lab.notebook("serve.ipynb", SERVE, kernel="plain", display_name="Plain")
        for name in ("work.ipynb", "moves.ipynb"):
            lab.notebook(name, *CELLS, kernel="plain", display_name="Plain")
        yield Desk(lab, page)


def keeper(lab: Lab) -> httpx.Client:
    """The keeper's own socket, as programs of the user's have it."""
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=str(lab.places.runtime / "keeper.sock")), base_url="http://keeper", timeout=60
    )


def test_two_notebooks_take_turns_on_one_gpu(desk: Desk, pictures: Path) -> None:
    """The second waits in the queue, says so everywhere, gives up, asks again, and is served when the first is
    suspended in the list; a cell of the first then waits itself, and has its variables when the second is stopped.
    """
    page = desk.page
    lab = desk.lab
    train = Notebook.open(page, lab, "train.ipynb")
    train.wait_ready(re.compile(r"A100-80GB · cold start · \d"))
    train.run(0, expected="begun")
    rival = Notebook(page, "train.ipynb")
    rival.open_another("rival.ipynb")
    expect(rival.status).to_contain_text("Waiting for a GPU (A100): place 1 of 1", timeout=START_TIMEOUT_MS)
    expect(rival.status).to_contain_text("train.ipynb")
    expect(rival.item).to_contain_text("A100 · queue 1/1")
    page.get_by_role("tab", name=re.compile("^Running Terminals and Kernels")).click()
    expect(desk.row("rival.ipynb")).to_contain_text("queued, place 1 of 1")
    page.screenshot(path=pictures / "queue.png", style=QUIET)
    picker = rival.pick()
    kind = picker.locator("label").filter(has=page.get_by_role("radio", name="A100-SXM4-80GB"))
    for told in ("80 GiB VRAM", "0 of 1 free", "Held by train.ipynb", "1 waits in the queue"):
        expect(kind).to_contain_text(told)
    assert_accessible(page, ".wc-Picker .jp-Dialog-content", ".wc-Banner", ".wc-Sandboxes")
    page.keyboard.press("Escape")

    rival.status.get_by_role("button", name="Cancel").click()
    rival.dismiss_start_error("waited for no longer")
    expect(desk.row("rival.ipynb")).to_contain_text("failed")
    rival.alert.get_by_role("button", name="Try again").click()
    expect(rival.status).to_contain_text("place 1 of 1", timeout=START_TIMEOUT_MS)
    expect(desk.row("rival.ipynb")).to_have_count(1)

    desk.row("train.ipynb").get_by_role("button", name="Suspend train.ipynb").click()
    expect(desk.row("train.ipynb")).to_contain_text("suspended", timeout=START_TIMEOUT_MS)
    rival.wait_ready(re.compile(r"A100-80GB · cold start · \d"))
    picker = rival.pick()
    parts = picker.get_by_role("table", name="What the start spent its time on")
    for part in ("queue", "create", "start", "ready"):
        expect(parts.get_by_role("row", name=re.compile(rf"^{part} [\d.]+ m?s$"))).to_be_visible()
    page.screenshot(path=pictures / "start.png", style=QUIET)
    page.keyboard.press("Escape")

    train.show("train.ipynb")
    expect(train.status).to_contain_text("This kernel is suspended")
    expect(train.item).to_contain_text("A100 · suspended")
    assert_accessible(page, ".wc-Banner", ".wc-Item", ".wc-Sandboxes")
    page.screenshot(path=pictures / "suspended.png", style=QUIET)
    code = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell").nth(1)
    code.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Shift+Enter")
    expect(train.status).to_contain_text("The cell goes on as soon as there is one", timeout=START_TIMEOUT_MS)
    desk.row("rival.ipynb").get_by_role("button", name="Stop rival.ipynb").click()
    expect(code.locator(".jp-OutputArea-output").first).to_contain_text("count is 1", timeout=CELL_TIMEOUT_MS)
    train.wait_ready(re.compile(r"A100-80GB · resumed · \d"))
    expect(desk.row("rival.ipynb")).to_have_count(0)
    desk.row("train.ipynb").get_by_role("button", name="Stop train.ipynb").click()
    expect(desk.row("train.ipynb")).to_have_count(0, timeout=START_TIMEOUT_MS)


def test_a_kernel_gets_another_gpu_and_gives_it_back(desk: Desk, pictures: Path) -> None:
    """The picker moves a kernel that lives to half of another GPU, which its meter shows; the list gives that back, and
    the next cell takes it again, which the toolbar says: the variables are there all the time.
    """
    page = desk.page
    page.set_viewport_size(WIDE)  # In a narrow notebook the meter is among the toolbar's further commands.
    moves = desk.open("moves.ipynb")
    moves.wait_ready(re.compile(r"CPU · (template|cold start) · \d"))
    moves.run(0, expected="begun")
    picker = moves.pick()
    keep = picker.get_by_role("checkbox", name="Keep its variables")
    expect(keep).to_have_count(0)
    picker.get_by_role("radio", name="T4").check()
    picker.get_by_role("combobox", name="Share").select_option("1/2")
    expect(keep).to_be_checked()
    assert_accessible(page, ".wc-Picker .jp-Dialog-content")
    page.screenshot(path=pictures / "other-gpu.png", style=QUIET)
    keep.uncheck()
    expect(picker.get_by_role("button", name="Apply this choice and restart the kernel")).to_be_visible()
    keep.check()
    picker.get_by_role("button", name="Apply this choice and keep the variables").click()
    expect(moves.item).to_contain_text("1/2 T4", timeout=START_TIMEOUT_MS)
    moves.run(1, expected="count is 1")
    meter = page.get_by_role(
        "img", name=re.compile(r"^This kernel uses: GPU 40 %, VRAM 1 GiB, CPU \d+ %, RAM \d+ MiB$")
    )
    expect(meter).to_be_visible(timeout=START_TIMEOUT_MS)
    assert_accessible(page, ".wc-Meter")
    desk.toolbar.screenshot(path=pictures / "meters.png")

    row = desk.row("moves.ipynb")
    row.get_by_role("button", name="Give the GPU of moves.ipynb back").click()
    expect(row).to_contain_text("parked", timeout=START_TIMEOUT_MS)
    expect(moves.status).to_contain_text("This kernel is parked")
    expect(moves.item).to_contain_text("1/2 T4 · parked")
    page.screenshot(path=pictures / "parked.png", style=QUIET)
    moves.run(1, expected="count is 2")
    moves.wait_ready(re.compile(r"1/2 T4 · unparked · \d"))
    expect(moves.item).to_have_class(re.compile("wc-mod-woken"))
    desk.toolbar.screenshot(path=pictures / "woken.png")
    expect(row.locator("summary")).not_to_contain_text("parked")
    row.get_by_role("button", name="Stop moves.ipynb").click()
    expect(row).to_have_count(0, timeout=START_TIMEOUT_MS)
    page.set_viewport_size(SIZE)


def test_whatever_runs_is_listed_and_metered(desk: Desk, pictures: Path) -> None:
    """A notebook's sandbox shows what it uses, in the toolbar and in the list; that of a program is listed beside it
    and can be stopped there; the status bar shows the machine.
    """
    page = desk.page
    work = desk.open("work.ipynb")
    work.wait_ready()
    work.run(0, expected="begun")
    with keeper(desk.lab) as program:
        made = program.post("/warmcell/api/v1/sandboxes", json={"spec": {"python": "/usr/bin/python3"}}).json()
        other = desk.row(f"Sandbox {made['id']}")
        expect(other).to_contain_text("program", timeout=START_TIMEOUT_MS)
        meter = page.get_by_role("img", name=re.compile(r"^This kernel uses: CPU \d+ %, RAM \d+ MiB$"))
        expect(meter).to_be_visible(timeout=START_TIMEOUT_MS)
        expect(page.locator(".wc-Machine")).to_contain_text(re.compile(r"CPU \d+ % · RAM .* of .* · 2 simulated GPUs"))
        row = desk.row("work.ipynb")
        expect(row).to_contain_text(re.compile(r"idle \d+ s"), timeout=START_TIMEOUT_MS)
        row.locator("summary").press("Enter")
        expect(row).to_contain_text(re.compile(r"RAM \d+ MiB"))
        expect(row.get_by_role("table")).to_contain_text("create")
        page.screenshot(path=pictures / "sandboxes.png", style=QUIET)
        assert_accessible(page, ".wc-Sandboxes", ".wc-Meter", ".wc-Item", ".wc-Machine")
        other.get_by_role("button", name="Stop").click()
        expect(other).to_have_count(0, timeout=START_TIMEOUT_MS)
        assert program.get(f"/warmcell/api/v1/sandboxes/{made['id']}").status_code == httpx.codes.NOT_FOUND


def test_a_web_port_is_opened_in_a_tab(desk: Desk, pictures: Path) -> None:
    """A page that a notebook serves on its own loopback is shown by the server: its script runs and asks for more, but
    has neither the server's cookies nor its origin.
    """
    page = desk.page
    work = desk.open("serve.ipynb")
    work.wait_ready()
    work.run(0, expected="serving")
    desk.row("serve.ipynb").get_by_role("button", name="Open a web port of serve.ipynb").click()
    dialog = page.get_by_role("dialog").filter(has_text="Open a Web Port of serve.ipynb")
    assert_accessible(page, ".jp-Dialog-content")
    page.locator(".jp-Dialog-content").screenshot(path=pictures / "port.png")
    with page.context.expect_page() as opened:
        dialog.get_by_role("button", name="Open").click()
    shown = opened.value
    expect(shown.get_by_role("status")).to_have_text("data: /data?x=1; origin null", timeout=START_TIMEOUT_MS)
    expect(shown.get_by_role("alert")).to_have_text("no cookies")
    assert "/warmcell/ports/8000-" in shown.url
    shown.close()
    desk.row("serve.ipynb").get_by_role("button", name="Stop serve.ipynb").click()
    expect(desk.row("serve.ipynb")).to_have_count(0, timeout=START_TIMEOUT_MS)


def test_snapshots_in_time(desk: Desk, pictures: Path) -> None:
    """Each is listed with its cell, its size and what it came from; one that was left behind becomes a notebook of its
    own, with the variables of then. In the dark.
    """
    page = desk.page
    desk.lab.choose("@jupyterlab/apputils-extension:themes", {"theme": "JupyterLab Dark"})
    work = desk.open("work.ipynb")
    work.wait_ready()
    work.run(0, expected="begun")
    desk.row("work.ipynb").get_by_role("button", name="Save a snapshot of work.ipynb").click()
    desk.save("as begun")
    work.run(1, expected="count is 1")
    work.kernel_menu("Save Snapshot…")
    desk.save("a mistake")
    work.kernel_menu("Snapshots…", exact=True)
    rows = work.dialog.get_by_role("radio")
    expect(rows).to_have_count(2, timeout=START_TIMEOUT_MS)
    mistake = work.dialog.get_by_role("radio", name=re.compile(r"^a mistake after cell \[(\d+)\] · .* · [\d.]+ MiB$"))
    expect(mistake).to_be_checked()
    work.dialog.get_by_role("radio", name=re.compile("^as begun")).check()
    work.dialog.get_by_role("button", name="Restore").click()
    expect(page.get_by_text("The kernel is as it was in “as begun”").first).to_be_visible(timeout=START_TIMEOUT_MS)
    work.run(1, expected="count is 1")
    work.kernel_menu("Save Snapshot…")
    desk.save("a better way")

    work.kernel_menu("Snapshots…", exact=True)
    expect(rows).to_have_count(3, timeout=START_TIMEOUT_MS)
    better = work.dialog.get_by_role("radio", name=re.compile("^a better way .* from “as begun”$"))
    expect(better).to_be_checked()
    page.screenshot(path=pictures / "timeline.png", style=QUIET)
    assert_accessible(page, ".wc-Snapshots .jp-Dialog-content", ".wc-Sandboxes")
    mistake.check()
    work.dialog.get_by_role("button", name="Fork").click()
    fork = Notebook(page, "work-Fork1.ipynb")
    fork.wait_shown()
    fork.wait_ready(re.compile(r"CPU · fork · \d"))
    fork.run(1, expected="count is 2")
    work.show("work.ipynb")
    picker = work.pick()
    assert_accessible(page, ".wc-Picker .jp-Dialog-content", ".wc-Sandboxes", ".wc-Item")
    picker.get_by_role("button", name="Cancel").click()


def test_a_new_notebook_on_chosen_hardware(desk: Desk, pictures: Path) -> None:
    """The launcher's card asks what the kernel is to have before it starts, and the notebook remembers that."""
    page = desk.page
    desk.open("work.ipynb")
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.get_by_role("menuitem", name="New Launcher").click()
    page.locator(".jp-LauncherCard").filter(has_text="Choose GPU…").click()
    picker = page.get_by_role("dialog").filter(has_text="Sandbox of a new notebook")
    picker.get_by_role("radio", name="T4").check()
    page.screenshot(path=pictures / "launcher.png", style=QUIET)
    picker.get_by_role("button", name="Apply this choice and start a kernel").click()
    fresh = Notebook(page, "Untitled.ipynb")
    fresh.wait_shown()
    assert "simulated" in fresh.wait_ready(re.compile(r"^T4 · cold start · \d"))
    remembered = json.loads((desk.lab.folder / "Untitled.ipynb").read_text())["metadata"]["warmcell"]
    assert remembered["gpu"] == "T4"
