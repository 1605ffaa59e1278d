"""The guest protocol, against a real init: requests, processes, streams and the end of it all."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.process.guest import TREE, Guest, gone, running_guest
from tests.leaks import Places
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import (
    CapacityError,
    InvalidRequestError,
    NotFoundError,
    OperationTimeoutError,
    ProtocolError,
    TransportError,
    UnsupportedOperationError,
    WarmcellError,
)

MIB = 2**20


@pytest.fixture
async def guest(places: Places) -> AsyncIterator[Guest]:
    async with running_guest(places.root) as running:
        yield running


def raw(guest: Guest, data: bytes, *, end: bool = True) -> bytes:
    """What comes back for these bytes on a connection of their own."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(guest.run / "init.sock"))
        answer = b""
        with contextlib.suppress(ConnectionError):  # It was answered before all was sent.
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                answer += piece
        return answer


async def test_hello_says_who_is_there(guest: Guest) -> None:
    """`hello` answers with the pid and the Python of init."""
    hello = await guest.channel.hello()
    assert hello.pid == guest.process.pid
    assert hello.python == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"hello\n",
        b"[1, 2]\n",
        b'{"op": "hello"\n',
        b'{"op": "hello"} {}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'{"op": "exec", "argv": "ls"}\n',
        b'{"op": "exec", "argv": []}\n',
        b'{"op": "exec", "argv": ["a\\u0000b"]}\n',
        b'{"op": "exec", "argv": ["true"], "env": {"A=B": "c"}}\n',
        b'{"op": "exec", "argv": ["true"], "env": [1]}\n',
        b'{"op": "exec", "argv": ["true"], "cwd": 7}\n',
        b'{"op": "kernel"}\n',
        b'{"op": "kernel", "connection": "x", "engine": "magic"}\n',
        b'{"op": "prepare", "preload": [1]}\n',
        b'{"op": "forward", "port": 70000}\n',
        b'{"op": "forward", "port": true}\n',
        b'{"op": "accept", "port": 0}\n',
        b'{"op": "accept"}\n',
        b'{"op": "signal", "pid": 1.5, "signum": 9}\n',
        b'{"op": "signal", "pid": 1, "signum": 99999999999}\n',
        b'{"op": NaN}\n',
    ],
)
async def test_a_malformed_request_is_refused(guest: Guest, line: bytes) -> None:
    """Whatever the line is, the answer is an error of the protocol and init serves on."""
    answer = json.loads(await asyncio.to_thread(raw, guest, line))
    assert answer["ok"] is False
    assert answer["code"] in ("invalid_request", "unsupported")
    assert answer["message"]
    await guest.channel.hello()


async def test_an_endless_line_is_refused(guest: Guest) -> None:
    """A request line has 1 MiB; more is refused, without waiting for its end."""
    answer = json.loads(await asyncio.to_thread(raw, guest, b"x" * (MIB + 65536), end=False))
    assert answer["code"] == "invalid_request"


async def test_what_runs_besides_is_told(guest: Guest) -> None:
    """Commands and what they leave behind, with their processor time; neither our own programs nor other processes
    of the machine.
    """
    assert (await guest.prepared("json"))["state"] == "ready"
    assert (await guest.channel.background()).told == ()
    busy = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; sleep 301 & echo up; exec sleep 302"
    async with guest.channel.exec_stream(["sh", "-c", busy]) as process, guest.channel.files_stream():
        async for _, content in process.output():
            if b"up" in content:
                break
        async with asyncio.timeout(60):
            both = ["sleep 301", "sleep 302"]
            while sorted((found := await guest.channel.background()).told) != both:  # noqa: ASYNC110 - as below
                await asyncio.sleep(0.01)
        assert 0 < found.cpu_s < 60
        assert not found.listens
    assert await asyncio.to_thread(gone, process.pid)
    async with asyncio.timeout(60):
        while (await guest.channel.background()).told:  # noqa: ASYNC110 - its group is killed, and nobody tells it
            await asyncio.sleep(0.01)


async def test_an_unknown_operation_is_named(guest: Guest) -> None:
    """An operation of a later protocol is refused by its name."""
    with pytest.raises(UnsupportedOperationError, match="fly"):
        await guest.channel._ask({"op": "fly"}, timeout=5)


async def test_a_connection_without_a_request_is_no_harm(guest: Guest) -> None:
    """Somebody who connects and leaves, or sends half a line, changes nothing."""
    assert await asyncio.to_thread(raw, guest, b"") == b""
    assert await asyncio.to_thread(raw, guest, b'{"op": "he') == b""
    await guest.channel.hello()


async def test_exec_gives_output_and_exit_code(guest: Guest) -> None:
    """A process's two streams come apart, with its exit code."""
    result = await guest.channel.exec(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)


async def test_exec_feeds_and_drains_megabytes(guest: Guest) -> None:
    """5 MB go in and come out the same, though no pipe holds that much."""
    text = "0123456789abcdef" * 330_000
    result = await guest.channel.exec(["cat"], input=text.encode())
    assert result.exit_code == 0
    assert result.stdout == text


async def test_a_death_by_signal_is_128_and_the_signal(guest: Guest) -> None:
    """As in a shell: SIGKILL gives 137."""
    assert (await guest.channel.exec(["sh", "-c", "kill -9 $$"])).exit_code == 137


@pytest.mark.parametrize(("command", "code"), [("no-such-command", 127), ("/etc/passwd", 126)])
async def test_a_command_that_cannot_run_is_a_result(guest: Guest, command: str, code: int) -> None:
    """What a shell says by 127 and 126 is said here too, with the reason on stderr."""
    result = await guest.channel.exec([command])
    assert result.exit_code == code
    assert command in result.stderr


async def test_a_missing_directory_is_an_error(guest: Guest) -> None:
    """A directory that the sandbox does not have is named before anything starts."""
    with pytest.raises(InvalidRequestError, match="/nowhere"):
        await guest.channel.exec(["true"], cwd="/nowhere")


async def test_the_environment_is_the_sandbox_s_with_changes(guest: Guest) -> None:
    """Variables are added, replaced, and taken away by null; the directory is the home unless given."""
    env = {"GIVEN": "é", "LANG": None}
    result = await guest.channel.exec(["sh", "-c", 'echo "$GIVEN ${LANG-none}"; pwd'], env=env)  # type: ignore[arg-type]
    assert result.stdout == f"é none\n{guest.run.parent / 'h'}\n"
    assert (await guest.channel.exec(["pwd"], cwd="/usr")).stdout == "/usr\n"


async def test_signals_are_as_in_a_fresh_process(places: Places) -> None:
    """Whatever init ignores, or has found ignored, what it starts ignores and blocks none, but for libc's own two."""
    before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # As a shell has it for what it starts in the background.
    try:
        async with running_guest(places.root) as guest:
            result = await guest.channel.exec(["cat", "/proc/self/status"])
    finally:
        signal.signal(signal.SIGQUIT, before)
    masks = dict(line.split(":\t") for line in result.stdout.splitlines() if line.startswith("Sig"))
    programs = ~(0b11 << 31)  # 32 and 33; whoever starts programs by posix_spawn leaves them ignored.
    assert int(masks["SigIgn"], 16) & programs == int(masks["SigBlk"], 16) & programs == 0


async def test_no_descriptor_of_init_reaches_a_process(guest: Guest) -> None:
    """A process has its three streams and nothing of init's, in a session of its own."""
    result = await guest.channel.exec(["sh", "-c", "ls /proc/$$/fd; ps -o pid=,sid= -p $$"])
    lines = result.stdout.split()
    assert lines[:-2] == ["0", "1", "2"]
    assert lines[-1] == lines[-2]


async def test_a_timeout_kills_the_whole_group(guest: Guest, places: Places) -> None:
    """What the process has started dies with it, and the error says what and how long."""
    note = places.root / "pid"
    for timeout in (0.5, 5.5, 50.5):  # It may take a while until it has started anything.
        with pytest.raises(OperationTimeoutError, match=rf"{timeout} s"):
            await guest.channel.exec(["sh", "-c", f"sleep 1000 & echo $! > {note}; wait"], timeout=timeout)
        if note.exists() and note.read_text():
            break
    assert gone(int(note.read_text()))


async def test_too_much_output_is_cut_off(guest: Guest) -> None:
    """A process that prints without end is killed at the cap instead of filling the keeper's memory."""
    with pytest.raises(CapacityError, match="1000000"):
        await guest.channel.exec(["yes"], output_max_bytes=1_000_000)


async def test_who_does_not_read_stops_the_writer(guest: Guest) -> None:
    """While nobody reads a process's output, init holds some hundred KiB of it and the process waits."""
    async with guest.channel.exec_stream(["yes"]) as process:
        await asyncio.sleep(0.3)
        before = resident_bytes(guest.process.pid)
        await asyncio.sleep(0.3)
        assert resident_bytes(guest.process.pid) - before < MIB
        assert before < 40 * MIB
        taken = 0
        async for _, content in process.output():
            taken += len(content)
            if taken > 20 * MIB:
                break
    assert (await guest.channel.exec(["echo", "on"])).stdout == "on\n"


async def test_a_child_in_the_background_does_not_hold_the_answer(guest: Guest, tmp_path: Path) -> None:
    """A command that leaves a server behind ends when it ends; the server is not hurt by printing later."""
    go, said = tmp_path / "go", tmp_path / "said"
    server = f"until [ -e {go} ]; do sleep 0.02; done; echo late; echo later; echo > {said}; exec sleep 1000"
    result = await guest.channel.exec(["sh", "-c", f"({server}) & echo $!"])
    go.touch()
    async with asyncio.timeout(60):
        while not said.exists():  # noqa: ASYNC110 - it depends on another process
            await asyncio.sleep(0.02)
    assert Path(f"/proc/{int(result.stdout)}").exists()
    await guest.channel.exec(["kill", "-9", result.stdout.strip()])


async def test_output_just_before_the_exit_is_kept(guest: Guest) -> None:
    """What lies in the pipes when the process ends is delivered, many times over."""
    results = await asyncio.gather(
        *(
            guest.channel.exec(["sh", "-c", f"head -c {size} /dev/zero; echo end >&2"])
            for size in range(0, 70_000, 7_000)
        )
    )
    assert [len(result.stdout) for result in results] == list(range(0, 70_000, 7_000))
    assert {result.stderr for result in results} == {"end\n"}


async def test_a_terminal_can_be_asked_for(guest: Guest) -> None:
    """With a pty the process has a controlling terminal of a size that can be changed, and whose ^C works."""
    async with guest.channel.exec_stream(
        ["sh", "-c", "tty; stty size; read x; stty size; exec cat"], pty=(24, 90)
    ) as process:
        output = process.output()
        text = await read_until(output, b"\n", count=2)
        assert b"/dev/pts/" in text
        assert b"24 90" in text
        await process.resize(33, 77)
        await process.write(b"go\n")
        assert b"33 77" in await read_until(output, b"33 77")
        await process.write(b"here\n")
        await read_until(output, b"here", count=2)  # from the terminal and from cat: a shell that forks may lose a ^C
        await process.write(b"\x03")
        async for _ in output:
            pass
    assert process.exit_code == 130


async def test_signals_go_to_the_process_and_its_group(guest: Guest) -> None:
    """A signal frame reaches the group; `signal` by pid does too, and only what init started can be signalled."""
    async with guest.channel.exec_stream(
        ["sh", "-c", "trap 'exit 7' USR1; echo up; while :; do sleep 0.01; done"]
    ) as first:
        await read_until(first.output(), b"up")
        await first.send_signal(signal.SIGUSR1)
        async for _ in first.output():
            pass
    assert first.exit_code == 7
    async with guest.channel.exec_stream(["sleep", "1000"]) as second:
        await guest.channel.signal(second.pid, signal.SIGTERM, group=True)
        async for _ in second.output():
            pass
    assert second.exit_code == 143
    for pid in (second.pid, os.getpid(), 1):
        with pytest.raises(NotFoundError, match=str(pid)):
            await guest.channel.signal(pid, 0)


async def test_a_signal_is_not_too_early_for_any_process(guest: Guest) -> None:
    """One that comes with the request itself, when the process has no group of its own yet, ends it too."""
    request = json.dumps({"op": "exec", "argv": ["sleep", "1000"]}).encode()
    frame = json.dumps({"signal": int(signal.SIGTERM)}).encode()
    said = request + b"\n" + b"\x03" + len(frame).to_bytes(4, "big") + frame
    for _ in range(20):
        answer = await asyncio.to_thread(raw, guest, said, end=False)
        assert b'"exit_code": 143' in answer or b'"exit_code":143' in answer, answer


async def test_a_signal_to_the_group_comes_once(guest: Guest) -> None:
    """A second SIGINT would hit a kernel while it handles the first, and its cell would never be answered."""
    # Signals of this kind queue, and each that is delivered writes one byte.
    code = (
        "import os, signal, sys; r, w = os.pipe(); os.set_blocking(w, False); signal.set_wakeup_fd(w);"
        "signal.signal(signal.SIGRTMIN, lambda *_: None); print('up!', flush=True); sys.stdin.readline();"
        "print(len(os.read(r, 100)), 'seen.', flush=True)"
    )
    async with guest.channel.exec_stream([sys.executable, "-c", code]) as process:
        output = process.output()
        await read_until(output, b"!")
        await guest.channel.signal(process.pid, signal.SIGRTMIN, group=True)
        await process.write(b"\n")
        assert b"1 seen." in await read_until(output, b"seen.")


async def test_nonsense_on_a_stream_changes_nothing(guest: Guest) -> None:
    """Control frames without sense are ignored; a frame beyond the limit ends the process."""
    async with guest.channel.exec_stream(["cat"]) as process:
        for content in (
            b"",
            b"[]",
            b'{"signal": "x"}',
            b'{"signal": 99999}',
            b'{"resize": [1]}',
            b'{"resize": [1, 2]}',
        ):
            await process._send(3, content)
        await process._send(9, b"unknown")
        await process.write(b"still here\n")
        await process.close_stdin()
        assert await read_until(process.output(), b"still here")
    async with guest.channel.exec_stream(["sleep", "1000"]) as process:
        process._writer.write(b"\0\xff\xff\xff\xff")
        with pytest.raises(TransportError):
            async for _ in process.output():
                pass
        assert gone(process.pid)


async def test_orphans_are_reaped(guest: Guest) -> None:
    """A process whose parent has gone ends as nobody's zombie."""
    result = await guest.channel.exec(["sh", "-c", "(sleep 0.2 & echo $!)"])
    pid = int(result.stdout)
    assert gone(pid)
    await guest.channel.hello()  # Init was told of the death before it was asked this.
    assert not Path(f"/proc/{pid}").exists()


async def test_a_port_is_forwarded_both_ways(guest: Guest) -> None:
    """Bytes pass in both directions at any size, and each direction ends by itself."""

    async def reverse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read())[::-1])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(reverse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    data = os.urandom(3 * MIB)
    async with server, asyncio.timeout(60), guest.channel.forward(port) as (reader, writer):
        writer.write(data)
        writer.write_eof()
        assert await reader.read() == data[::-1]


async def test_a_port_where_nobody_listens_is_said(guest: Guest) -> None:
    """The error names the port and the cure."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(NotFoundError, match=str(port)) as caught:
            async with guest.channel.forward(port):
                pass
    assert caught.value.hint


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


async def test_who_connects_to_an_accepted_port_speaks_with_the_host(guest: Guest) -> None:
    """One after another, both ways, each direction by itself; who comes before the host waits for it."""
    port, data = free_port(), os.urandom(3 * MIB)
    await guest.channel.listen(port)
    async with asyncio.timeout(60):
        for _ in range(3):
            ours, ours_out = await asyncio.open_connection("127.0.0.1", port)
            ours_out.write(data)
            ours_out.write_eof()
            async with guest.channel.accept(port) as (reader, writer):
                writer.write((await reader.read())[::-1])
                writer.write_eof()
                assert await ours.read() == data[::-1]
            ours_out.close()


async def test_a_port_is_closed_when_the_host_no_longer_waits_there(guest: Guest) -> None:
    """And can be opened again; what was accepted goes on."""
    port = free_port()
    async with asyncio.timeout(60):
        await guest.channel.listen(port)
        ours, ours_out = await asyncio.open_connection("127.0.0.1", port)
        async with guest.channel.accept(port) as (_, writer):
            waiting = asyncio.create_task(guest.channel.accept(port).__aenter__())
            await guest.channel.hello()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await guest.channel.hello()
            with pytest.raises(ConnectionError):
                await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"still here")
            assert await ours.readexactly(10) == b"still here"
        ours_out.close()
        await guest.channel.listen(port)
        _, again = await asyncio.open_connection("127.0.0.1", port)
        again.close()


async def test_a_port_that_is_taken_is_not_accepted(guest: Guest) -> None:
    """Somebody in the sandbox has it: an error, and init serves on."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(WarmcellError, match="in use"):
        await guest.channel.listen(taken.getsockname()[1])
    await guest.channel.hello()


async def test_who_has_connected_sees_the_end_when_the_host_goes(guest: Guest) -> None:
    """The host hangs up in the middle: the program reads the end, and the next one is served."""
    port = free_port()
    async with asyncio.timeout(60):
        await guest.channel.listen(port)
        for _ in range(2):
            ours, ours_out = await asyncio.open_connection("127.0.0.1", port)
            ours_out.write(b"x" * MIB)
            async with guest.channel.accept(port) as (reader, _):
                await reader.read(1)
            with contextlib.suppress(ConnectionError):
                assert await ours.read() == b""
            ours_out.close()


async def test_opening_waits_for_a_guest_that_comes_late(places: Places) -> None:
    """The host may wait first; it is told as soon as init listens."""
    run = places.root / "g"
    run.mkdir()
    opening = asyncio.create_task(GuestChannel.open(run, timeout=60))
    await asyncio.sleep(0.2)
    assert not opening.done()
    argv = ["-I", "-S", f"{TREE}/init.py", "--run", str(run), "--guest", str(TREE), "--python", sys.executable]
    process = await asyncio.create_subprocess_exec(sys.executable, *argv)
    try:
        channel = await opening
        assert (await channel.hello()).pid == process.pid
        assert sorted(os.listdir(run)) == ["init.sock"]
        assert (run / "init.sock").stat().st_mode & 0o777 == 0o600
    finally:
        process.terminate()
        await process.wait()


async def test_opening_gives_up_in_time(places: Places) -> None:
    """Where no guest comes, the error says for how long it was waited."""
    run = places.root / "g"
    run.mkdir()
    with pytest.raises(OperationTimeoutError, match=r"0\.2 s"):
        await GuestChannel.open(run, timeout=0.2)
    assert os.listdir(run) == []


async def test_a_link_instead_of_the_socket_is_refused(guest: Guest, places: Places) -> None:
    """A guest that puts a link to somebody else's socket in its place does not get us to talk to that."""
    other = places.root / "other.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(other))
        listener.listen()
        listener.setblocking(False)
        run = places.root / "forged"
        run.mkdir()
        (run / "init.sock").symlink_to(other)
        with pytest.raises(WarmcellError):
            await GuestChannel(run).hello()
        (run / "ready").symlink_to(places.root / "victim")
        with pytest.raises(WarmcellError):
            await GuestChannel.open(run, timeout=0.5)
        with pytest.raises(BlockingIOError):
            listener.accept()
    other.unlink()
    assert not (places.root / "victim").exists()


async def test_a_guest_that_talks_nonsense_is_an_error(places: Places) -> None:
    """Answers that are no JSON, no object, endless or of another protocol raise ProtocolError or TransportError."""
    run = places.root / "g"
    run.mkdir()
    answers = [b"hello\n", b"[]\n", b'{"ok": true, "protocol": 99}\n', b"x" * 5_000_000, b"", b'{"ok": false}\n']

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answers[0])
        writer.close()

    server = await asyncio.start_unix_server(answer, str(run / "init.sock"))
    async with server:
        for expected in (ProtocolError, ProtocolError, ProtocolError, TransportError, TransportError, WarmcellError):
            with pytest.raises(expected):
                await GuestChannel(run).hello()
            answers.pop(0)
    (run / "init.sock").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "event",
    [
        {"event": "template", "state": "magic", "name": "x"},
        {"event": "template", "nonsense": 1},
        {"event": "kernel", "pid": "x", "state": "running"},
        {"event": "kernel", "pid": 5, "state": "flying"},
        {"event": "kernel", "pid": 5, "state": "exited"},
    ],
)
async def test_an_event_that_is_none_is_an_error(places: Places, event: dict[str, object]) -> None:
    """What a guest tells is checked before anybody acts on it; events of other kinds are passed over."""
    run = places.root / "g"
    run.mkdir()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b'{"ok": true}\n{"event": "later version"}\n' + json.dumps(event).encode() + b"\n")
        writer.close()

    async with await asyncio.start_unix_server(answer, str(run / "init.sock")):
        with pytest.raises(ProtocolError):
            async for told in GuestChannel(run).events():
                pytest.fail(f"{told} was taken for an event")


async def test_nothing_is_left_when_init_is_told_to_end(places: Places) -> None:
    """On SIGTERM init takes along what it started and what those started."""
    async with running_guest(places.root) as guest:
        result = await guest.channel.exec(["sh", "-c", "setsid sh -c 'sleep 1000 & sleep 1000' >&- 2>&- & echo $!"])
        kernel = await guest.kernel("cold")
        guest.process.terminate()
        assert await guest.process.wait() == 128 + signal.SIGTERM
        assert gone(int(result.stdout))
        assert gone(kernel.pid)


async def test_init_ends_with_its_parent(places: Places) -> None:
    """Under no pid namespace of its own, init notices that who started it is gone."""
    run = places.root / "g"
    run.mkdir()
    code = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); sys.stdin.read()"
    argv = [sys.executable, "-I", "-S", f"{TREE}/init.py", "--run", str(run), "--guest", str(TREE)]
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, *argv, "--python", sys.executable),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    await GuestChannel.open(run, timeout=60)
    parent.kill()
    await parent.wait()
    assert gone(pid)


async def test_init_ends_if_nobody_ever_comes(places: Places) -> None:
    """Who has made a sandbox may be killed in the moment in which it comes up, and is then missed by no one."""
    run = places.root / "g"
    run.mkdir()
    code = (
        "import sys; sys.modules['warmcell_guest'] = package = type(sys)('warmcell_guest'); "
        f"package.__path__ = [{str(TREE)!r}]; from warmcell_guest.supervisor import server; "
        "server.FIRST_REQUEST_S = float(sys.argv.pop()); server.main(sys.argv[1:])"
    )
    argv = [sys.executable, "-c", code, "--run", str(run), "--guest", str(TREE), "--python", sys.executable]
    for first_request_s in (2.0, 10.0, 50.0):  # On a busy machine we may be late ourselves.
        visited = await asyncio.create_subprocess_exec(*argv, str(first_request_s))
        try:
            channel = await GuestChannel.open(run, timeout=first_request_s)
            await channel.exec(["true"])
            break
        except WarmcellError:
            await visited.wait()
            (run / "init.sock").unlink(missing_ok=True)
    (run / "init.sock").unlink()
    left = await asyncio.create_subprocess_exec(*argv, str(first_request_s))
    async with asyncio.timeout(60):
        await left.wait()
    assert visited.returncode is None
    visited.terminate()
    await visited.wait()


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def read_until(output: AsyncIterator[tuple[str, bytes]], wanted: bytes, *, count: int = 1) -> bytes:
    """The output up to the `count`-th time that `wanted` has come."""
    text = b""
    async with asyncio.timeout(60):
        while text.count(wanted) < count:
            _, content = await anext(output)
            text += content
    return text


async def test_the_last_words_of_a_hasty_process_arrive(guest: Guest) -> None:
    """A process that ends before its input is closed: init waits for the host, and nothing of its output is lost."""
    for number in range(50):
        async with guest.channel.exec_stream(["sh", "-c", f"echo {number}"]) as process:
            assert gone(process.pid)
            for _ in range(20):
                await process.write(b"x")
                await asyncio.sleep(0)
            said = b"".join([content async for _, content in process.output()])
            assert (said, process.exit_code) == (f"{number}\n".encode(), 0)
