"""From the first process to the last."""

import asyncio
import os
import signal
from pathlib import Path

from warmcell.sandbox.backends.base import SandboxInstance
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.testing.contract.subject import GUEST_TIMEOUT_S, Register, Subject, expect

check = Register()


@check()
async def the_guest_answers_in_the_run_directory(subject: Subject) -> None:
    async with subject.box() as box:
        hello = await box.channel.hello()
        expect(hello.python.startswith("3."), f"the guest runs on Python {hello.python!r}")


@check()
async def the_run_directory_is_called_run_in_the_sandboxs_directory(subject: Subject) -> None:
    async with subject.box() as box:
        expect(box.instance.run_directory == box.directory / "run", f"it is {box.instance.run_directory}")
        expect(box.instance.guest_run_directory.startswith("/"), "the guest's name of it is not absolute")


@check()
async def output_and_exit_code_of_a_command_are_data(subject: Subject) -> None:
    async with subject.box() as box:
        said, failed = await box.run("echo", "hello"), await box.run("false")
        expect((said.stdout, said.stderr, said.exit_code) == ("hello\n", "", 0), f"echo gave {said}")
        expect(failed.exit_code == 1, f"false gave {failed}")


@check()
async def a_command_that_does_not_exist_is_no_failure_of_the_sandbox(subject: Subject) -> None:
    async with subject.box() as box:
        missing = await box.run("no-such-command")
        expect(missing.exit_code == 127, f"it gave {missing}")
        expect((await box.run("true")).exit_code == 0, "the sandbox is of no use afterwards")


@check(programs=True)
async def standard_input_reaches_a_command(subject: Subject) -> None:
    async with subject.box() as box:
        said = await box.run("cat", input=b"abc" * 50_000)
        expect(said.stdout == "abc" * 50_000, f"{len(said.stdout)} characters came back")


@check(programs=True)
async def a_file_in_the_run_directory_is_seen_on_both_sides(subject: Subject) -> None:
    async with subject.box() as box:
        (box.instance.run_directory / "from-host").write_text("one")
        (box.instance.run_directory / "from-host").chmod(0o644)
        run = box.instance.guest_run_directory
        said = await box.says(f"cat {run}/from-host; printf two > {run}/from-guest")
        expect(said == "one", f"the guest reads {said!r}")
        expect((box.instance.run_directory / "from-guest").read_text() == "two", "the host does not see the guest's")


def shares_the_kernel(subject: Subject) -> bool:
    """Whether the host sees its processes."""
    return not subject.own_kernel


@check(programs=True, needs=shares_the_kernel)
async def its_processes_are_listed_by_their_pids_on_the_host(subject: Subject) -> None:
    async with subject.box() as box:
        expect(box.instance.pid in box.instance.processes(), "the first process is not listed")
        async with box.channel.exec_stream(["cat"]) as process:
            await process.write(b"up")
            await anext(process.output())
            names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in box.instance.processes()]
            expect("cat" in names, f"only {names} are listed")


@check(programs=True, needs=lambda subject: subject.own_kernel)
async def of_a_kernel_of_its_own_the_host_sees_what_it_runs_in_and_nothing_in_it(subject: Subject) -> None:
    async with subject.box() as box:
        await box.says("setsid sleep 54321 >/dev/null 2>&1 & sleep 0.1")
        pids = list(box.instance.processes())
        expect(box.instance.pid in pids, "what runs the kernel is not listed")
        shown = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids]
        expect(not any(b"54321" in line for line in shown), "the host sees a process of its")
    left = [pid for pid in pids if _state(pid) not in ("", "Z")]
    expect(not left, f"{left} are left")


@check()
async def after_stop_it_has_no_processes(subject: Subject) -> None:
    instance = await subject.create()
    await instance.stop()
    expect(not instance.processes(), f"it has {instance.processes()}")


@check()
async def stop_can_be_repeated(subject: Subject) -> None:
    instance = await subject.create()
    first, second = await instance.stop(), await instance.stop()
    expect(first == second, f"first {first}, then {second}")


@check()
async def stop_can_be_called_by_several_at_once(subject: Subject) -> None:
    instance = await subject.create()
    ends = await asyncio.gather(*(instance.stop() for _ in range(3)))
    expect(len(set(ends)) == 1, f"they were told {ends}")


@check()
async def a_stop_that_is_cancelled_goes_on(subject: Subject) -> None:
    place = subject.place()
    instance = await subject.create(place=place)
    stop = asyncio.ensure_future(instance.stop())
    await asyncio.sleep(0)
    stop.cancel()
    await asyncio.gather(stop, return_exceptions=True)
    await asyncio.wait_for(instance.wait(), 60)
    await instance.stop()
    subject.nothing_is_left(*place)


@check()
async def any_number_may_wait_for_its_end(subject: Subject) -> None:
    instance = await subject.create()
    waiting = [asyncio.ensure_future(instance.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    ended = await instance.stop()
    told = await asyncio.gather(*waiting, return_exceptions=True)
    expect(isinstance(told[0], asyncio.CancelledError), "the one who gave up was told")
    expect(told[1:] == [ended, ended], f"they were told {told[1:]}")


@check()
async def nobody_is_told_of_its_end_before_it_ends(subject: Subject) -> None:
    async with subject.box() as box:
        waiting = asyncio.ensure_future(box.instance.wait())
        await box.channel.hello()
        expect(not waiting.done(), "its end was told while it ran")
        waiting.cancel()


@check(programs=True, needs=lambda subject: subject.signals)
async def its_end_is_told_when_its_first_process_is_killed(subject: Subject) -> None:
    place = subject.place()
    instance = await subject.create(place=place)
    os.kill(instance.pid, signal.SIGKILL)
    ended = await asyncio.wait_for(instance.wait(), 60)
    expect(ended.exit_code == 137, f"the exit code is {ended.exit_code}")
    expect(not ended.oom_killed, "it says that memory was short")
    expect(await instance.stop() == ended, "stop tells of another end")
    subject.nothing_is_left(*place)


@check(programs=True)
async def its_last_words_are_told_with_its_end(subject: Subject) -> None:
    instance = await subject.create()
    await _last_words(subject, instance, "farewell")
    ended = await instance.stop()
    expect("farewell" in ended.message, f"its last words are {ended.message!r}")


@check(programs=True)
async def a_flood_of_last_words_is_cut(subject: Subject) -> None:
    instance = await subject.create()
    await _last_words(subject, instance, "x" * 300_000)
    ended = await instance.stop()
    expect(0 < len(ended.message) <= 4096, f"{len(ended.message)} characters were kept")


@check(programs=True, needs=shares_the_kernel)
async def stop_kills_what_ignores_signals_and_has_left_its_session(subject: Subject) -> None:
    async with subject.box() as box:
        await box.says("trap '' TERM INT HUP; setsid sh -c 'trap \"\" TERM; sleep 300' >/dev/null 2>&1 & sleep 0.2")
        pids = [pid for pid in box.instance.processes() if Path(f"/proc/{pid}/comm").read_text() == "sleep\n"]
        expect(pids, "it did not start")
    left = [pid for pid in pids if _state(pid) not in ("", "Z")]
    expect(not left, f"{left} are left")


@check(programs=True, needs=lambda subject: subject.signals)
async def what_outlives_the_first_process_is_killed_as_well(subject: Subject) -> None:
    place = subject.place()
    instance = await subject.create(place=place)
    channel = await GuestChannel.open(instance.run_directory, timeout=GUEST_TIMEOUT_S)
    await channel.exec(["sh", "-c", "setsid sleep 300 >/dev/null 2>&1 &"], timeout=60)
    await channel.close()
    os.kill(instance.pid, signal.SIGKILL)
    await instance.wait()
    await instance.stop()
    subject.nothing_is_left(*place)


@check(programs=True)
async def orphans_are_reaped_by_the_first_process(subject: Subject) -> None:
    async with subject.box() as box:
        await box.says("for n in 1 2 3 4 5; do (sh -c 'exit 0' &) ; done; sleep 0.3")
        states = [_state(pid) for pid in box.instance.processes()]
        expect("Z" not in states, f"there are zombies: {states}")


@check()
async def a_quiet_sandbox_was_never_short_of_memory(subject: Subject) -> None:
    async with subject.box() as box:
        expect(box.instance.oom_kills() == 0, f"{box.instance.oom_kills()} processes were killed for memory")


@check()
async def nobody_answers_after_stop(subject: Subject) -> None:
    instance = await subject.create()
    channel = await GuestChannel.open(instance.run_directory, timeout=GUEST_TIMEOUT_S)
    await instance.stop()
    try:
        await channel.hello()
    except WarmcellError as error:
        expect(error.hint, "the error names no cure")
    else:
        expect(False, "somebody answers")
    finally:
        await channel.close()


async def _last_words(subject: Subject, instance: SandboxInstance, words: str) -> None:
    """Have its init say something on its standard error."""
    if not subject.own_kernel:
        await asyncio.to_thread(Path(f"/proc/{instance.processes()[-1]}/fd/2").write_text, words)
        return
    channel = await GuestChannel.open(instance.run_directory, timeout=GUEST_TIMEOUT_S)
    said = await channel.exec(["sh", "-c", "cat > /proc/1/fd/2"], input=words.encode(), timeout=10)
    await channel.close()
    expect(said.exit_code == 0, f"init's standard error cannot be written: {said.stderr}")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
