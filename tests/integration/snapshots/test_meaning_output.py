"""Clients stay connected and lose nothing: what is said is what an undisturbed kernel says, message by message."""

import asyncio
import functools
import random
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.snapshots.notebooks import Notebook, Page, keeper, notebook, page
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

GO = "go"
"""A file of the workspace that the script waits for."""

CELLS = (
    "import sys, threading, time\nfrom IPython.display import clear_output, display, HTML, update_display\nn = 0",
    """
def chatter():
    for line in range(400):
        print(f"line {line}", file=sys.stderr, flush=True); time.sleep(0.01)
thread = threading.Thread(target=chatter); thread.start(); print("begun")
""",
    "for _ in range(40):\n    n += 1; print(n, flush=True); time.sleep(0.02)\nn",
    "display(HTML('<b>bold</b>'), display_id='a'); time.sleep(0.2); update_display(HTML('<i>new</i>'), display_id='a')",
    "1 / 0",
    "for _ in range(30):\n    n += 1; print('x' * 2000, flush=True); time.sleep(0.02)\nclear_output(); n",
    "def count():\n    while True:\n        yield 1\ng = count(); next(g)",
    "thread.join()\nimport os\nwhile not os.path.exists('go'): time.sleep(0.01)\nn",
)
"""The last one waits until `GO` is there, so that there is time enough for all that is to be done meanwhile."""


def sequences(opened: Page, asked: list[str]) -> tuple[list[list[Any]], str]:
    """What was published for each cell, pieces of a stream put together; and apart from it, what the thread said."""
    told, thread = [], ""
    for message in opened.heard:
        if message["msg_type"] == "stream" and message["content"]["name"] == "stderr":
            thread += message["content"]["text"]
    for msg_id in asked:
        of_cell: list[Any] = []
        for message in opened.of(msg_id):
            kind, content = message["msg_type"], dict(message["content"])
            if kind == "stream":
                if content["name"] == "stderr":
                    continue
                if of_cell and of_cell[-1][0] == "stream":
                    of_cell[-1][1]["text"] += content["text"]
                    continue
            of_cell.append((kind, content))
        reply = opened.replies[msg_id]["content"]
        told.append([*of_cell, ("reply", reply["status"], reply["execution_count"])])
    return told, thread


def of_cells(opened: Page, asked: list[str]) -> list[str]:
    """The messages that came in answer to these cells, in their order."""
    return [each["header"]["msg_id"] for each in opened.heard if each["parent_header"].get("msg_id") in asked]


def has_heard(opened: Page, name: str) -> bool:
    return any(each["header"]["msg_id"] == name for each in opened.heard)


async def script(notebook: Notebook) -> list[str]:
    """Run the cells, as a person does who has typed ahead."""
    asked = [notebook.page.send(code, stop_on_error=False) for code in CELLS]
    for msg_id in asked:
        await notebook.page.done(msg_id, timeout=120)
    return asked


async def disturb(notebook: Notebook, verb: str, go: Path) -> None:
    """Do one thing with it again and again, at random moments, until cancelled; after twice the script may end."""
    moments = random.Random(len(verb))
    count = 0
    while True:
        await asyncio.sleep(moments.uniform(0.0, 0.3))
        if verb == "suspend":
            await notebook.do("suspend", busy=True)
            await asyncio.sleep(moments.uniform(0.0, 0.1))
            await notebook.do("resume")
        elif verb == "fork":
            for clone in (await notebook.do("fork", n=1))["sandboxes"]:
                await notebook.keeper.delete(f"/sandboxes/{clone['id']}")
        else:
            await notebook.do("snapshot")
        count += 1
        if count == 2:
            go.touch()


async def test_nothing_that_is_said_is_lost_or_said_twice(places: Places, tmp_path: Path) -> None:
    """Every message of a script, in kernels beside each other that are suspended, saved or cloned again and again."""
    async with keeper(places) as client, asyncio.TaskGroup() as all_of_them:
        wanted = all_of_them.create_task(as_it_is(client, made_anew(tmp_path / "undisturbed")))
        for verb in ("suspend", "snapshot", "fork"):
            folder = made_anew(tmp_path / verb)
            all_of_them.create_task(as_it_is_when_disturbed(client, folder, verb, wanted))


def made_anew(folder: Path) -> Path:
    """A workspace of a kernel's own."""
    folder.mkdir()
    return folder


async def as_it_is(client: KeeperClient, folder: Path) -> tuple[list[list[Any]], str]:
    """What an undisturbed kernel says."""
    (folder / GO).touch()
    async with notebook(client, folder) as made:
        wanted = sequences(made.page, await script(made))
        assert wanted[1] == "".join(f"line {number}\n" for number in range(400))
        await client.delete(f"/kernels/{made.kernel_id}")
        return wanted


async def as_it_is_when_disturbed(
    client: KeeperClient, folder: Path, verb: str, wanted: Awaitable[tuple[list[list[Any]], str]]
) -> None:
    """A kernel to which one thing is done again and again says the same, to all who listen."""
    async with notebook(client, folder) as made, page(made.body["connection"]) as other:
        await other.ready()
        disturbing = asyncio.create_task(disturb(made, verb, folder / GO))
        disturbing.add_done_callback(lambda _: (folder / GO).touch())
        try:
            asked = await script(made)
        finally:
            disturbing.cancel()
            await asyncio.gather(disturbing, return_exceptions=True)
        assert disturbing.cancelled(), disturbing.exception()
        assert sequences(made.page, asked) == await wanted, verb
        names = [each["header"]["msg_id"] for each in made.page.heard]
        assert len(set(names)) == len(names)
        await other.until(functools.partial(has_heard, other, names[-1]))
        assert of_cells(other, asked) == of_cells(made.page, asked)
        await client.delete(f"/kernels/{made.kernel_id}")


async def test_a_reply_says_what_the_kernel_said(places: Places, tmp_path: Path) -> None:
    """Cells that end while their kernel is being saved: what a page is to do with the reply is in it."""
    moments = random.Random(2)
    cell = "import time; time.sleep({}); get_ipython().set_next_input('after {}')"
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        for verb, times in (("snapshot", 10), ("fork", 3), ("suspend", 5)):
            for number in range(times):
                asked = made.page.send(cell.format(moments.uniform(0.0, 0.3), number))
                told = await made.do(verb, **({"busy": True} if verb == "suspend" else {}))
                if verb == "suspend":
                    await made.do("resume")
                for clone in told.get("sandboxes", ()):
                    await client.delete(f"/sandboxes/{clone['id']}")
                payload = (await made.page.done(asked, timeout=60))["payload"]
                assert [each["text"] for each in payload] == [f"after {number}"], (verb, number)


async def test_a_question_reaches_the_page(places: Places, tmp_path: Path) -> None:
    """A cell that asks for input while its kernel is being saved is answered."""
    moments = random.Random(3)
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        for number in range(5):
            cell = f"import time; time.sleep({moments.uniform(0.0, 0.2)}); print(input('what?'))"
            asked = made.page.send(cell, allow_stdin=True)
            saving = asyncio.create_task(made.do("snapshot"))
            question = await made.page.client.get_stdin_msg(timeout=60)
            assert question["content"]["prompt"] == "what?"
            made.page.client.input(f"answer {number}")
            assert (await made.page.done(asked, timeout=60))["status"] == "ok"
            await saving
            assert made.page.said(asked) == f"answer {number}"
