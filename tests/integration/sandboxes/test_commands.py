"""Commands in sandboxes: what they say, those that outlive their client, terminals."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from warmcell import AsyncSandbox, Sandbox
from warmcell.sandbox import errors
from warmcell.sandbox.models import CommandError, ExecResult

pytestmark = pytest.mark.bubblewrap


def test_commands_end_with_what_they_said(box: Sandbox) -> None:
    """Arguments go as they are, input, variables and directory too; a failure is data; a missing one is 127."""
    assert box.exec("printf", "%s|", "a b", "$HOME", "").stdout == "a b|$HOME||"
    script = "cat; echo $SAID $MORE >&2; pwd; exit 3"
    done = box.exec("sh", "-c", script, input="x\n", env={"MORE": "1"}, cwd="/tmp")
    assert done == ExecResult(stdout="x\n/tmp\n", stderr="to all 1\n", exit_code=3)
    with pytest.raises(CommandError, match="exit code 3\nto all 1") as failed:
        done.check()
    assert failed.value.result is done
    assert box.exec("true").check().exit_code == 0
    assert box.exec("no-such-program").exit_code == 127
    with pytest.raises(errors.InvalidRequestError):
        box.exec("true", cwd="/no/such/place")
    with pytest.raises(errors.OperationTimeoutError) as late:
        box.exec("sh", "-c", "echo so far; echo oh >&2; sleep 60", timeout=1)
    assert (late.value.details["stdout"], late.value.details["stderr"]) == ("so far\n", "oh\n")


def test_much_output_comes_whole_and_in_order(box: Sandbox) -> None:
    """More than is kept comes through when somebody reads; a character in two pieces is one."""
    seen: list[int] = []
    done = box.exec("sh", "-c", "yes 0123456789 | head -c 20000000", on_stdout=lambda text: seen.append(len(text)))
    assert done.stdout == ("0123456789\n" * 1818182)[:20000000]
    assert len(seen) > 10
    assert sum(seen) == 20000000
    assert box.exec("sh", "-c", r"printf '\303'; sleep 0.1; printf '\244'").stdout == "ä"


def test_a_command_in_the_background_is_found_again(box: Sandbox) -> None:
    """Input goes to it, another client finds it by its id and hears all of it, and it can be killed."""
    command = box.spawn("sh", "-c", "read line; echo got $line; read line; echo and $line; exit 5", tag="mine")
    command.write("one\n")
    with contextlib.closing(Sandbox.connect(box.id)) as other:
        again = next(one for one in other.commands() if one.info().tag == "mine")
        again_id = other.command(command.id)
        assert again.id == again_id.id == command.id
        command.write("two\n")
        assert again.wait() == ExecResult(stdout="got one\nand two\n", stderr="", exit_code=5)
    assert command.wait().stdout == "got one\nand two\n"
    sleeping = box.spawn("sleep", "60")
    sleeping.kill()
    assert sleeping.info().state == "ended"
    terminated = box.spawn("sleep", "60")
    terminated.terminate()
    assert terminated.wait().exit_code == 128 + signal.SIGTERM


def test_input_of_several_comes_in_the_order_in_which_it_was_written(box: Sandbox) -> None:
    """Whoever finds a command again writes after what others have written, and they after that."""
    command = box.spawn("cat")
    command.write("one\n")
    with contextlib.closing(Sandbox.connect(box.id)) as other:
        again = other.command(command.id)
        again.write("two\n")
        command.write(b"three\n")
        again.write(memoryview(b"four\n"))
        again.close_stdin()
        with pytest.raises(errors.ConflictError):
            command.write("late\n")
    assert command.wait().stdout == "one\ntwo\nthree\nfour\n"


async def test_input_of_several_at_once_is_all_there(box: Sandbox) -> None:
    """Pieces that are sent beside each other, more than is taken at once: none is lost or torn."""
    same = await AsyncSandbox.connect(box.id)
    command = await same.spawn("sh", "-c", "sleep 0.5; cat")
    pieces = [f"{number}" * 200_000 + "\n" for number in range(8)]
    await asyncio.gather(*(command.write(piece) for piece in pieces))
    await command.close_stdin()
    assert sorted((await command.wait()).stdout.splitlines(keepends=True)) == pieces
    await same.close()


def test_a_command_survives_the_program_that_started_it(box: Sandbox, tmp_path: Path) -> None:
    """A client that is killed leaves it running; its output since then is there."""
    program = (
        "import os, sys; from warmcell import Sandbox; box = Sandbox.connect(sys.argv[1]);"
        "script = 'echo before; while ! test -e go; do sleep 0.01; done; echo after';"
        "print(box.spawn('sh', '-c', script).id, flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    started = subprocess.run([sys.executable, "-c", program, box.id], capture_output=True, text=True, timeout=60)
    command = box.command(started.stdout.strip())
    assert command.info().state == "running", started.stderr
    box.files.write("go", "")
    assert command.wait().stdout == "before\nafter\n"
    box.files.remove("go")


def test_a_terminal_is_one(box: Sandbox) -> None:
    """It has the size that was asked for, and that it is given later; ^C interrupts."""
    # It waits without making processes, at which moment a shell may lose a ^C.
    command = box.spawn(
        "sh", "-c", "stty size; trap 'stty size; exit 7' INT; echo up; while :; do read x; done", pty=(30, 99)
    )
    said: list[str] = []
    first = threading.Event()

    def hear(text: str) -> None:
        said.append(text)
        if "up" in "".join(said):
            first.set()

    waiting = threading.Thread(
        target=lambda: said.append(str(reader.command(command.id).wait(on_stdout=hear).exit_code))
    )
    with contextlib.closing(Sandbox.connect(box.id)) as reader:
        waiting.start()
        assert first.wait(60)
        command.resize(40, 120)
        command.write(b"\x03")
        waiting.join(60)
    text = "".join(said)
    assert text.startswith("30 99\r\n")
    assert "40 120\r\n" in text
    assert text.endswith("7")


async def test_many_things_at_once_from_a_loop(at_home: None) -> None:
    """The flavour for event loops does the same, side by side; callbacks may be coroutines."""
    heard: list[str] = []

    async def hear(text: str) -> None:
        await asyncio.sleep(0)
        heard.append(text)

    async with AsyncSandbox(preload=()) as own:
        ran, listed, written = await asyncio.gather(
            own.run("print('x'); 1 + 1", on_stdout=hear), own.exec("echo", "hi"), own.files.write("a", "b")
        )
        assert (ran.text, listed.stdout, written.size_bytes, heard) == ("2", "hi\n", 1, ["x\n"])
        began = asyncio.Event()
        slow = asyncio.create_task(own.exec("sh", "-c", "echo; exec sleep 60", on_stdout=lambda text: began.set()))
        await began.wait()
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        assert all(one.state == "ended" for one in [await command.info() for command in await own.commands()])
        found = await AsyncSandbox.connect(own.id)
        assert (await found.run("1")).text == "1"
        await found.close()
