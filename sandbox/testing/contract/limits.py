"""Caps: told, and held where they are told to be."""

import asyncio
import dataclasses

from warmcell.sandbox.models import MIB, Limits
from warmcell.sandbox.testing.contract.subject import SMALL, Box, Register, Subject, expect

check = Register()

NAMES = {"memory", "pids", "cpu", "layer"}
CAPPED = dataclasses.replace(SMALL, memory_bytes=192 * MIB, pids=48, cpus=0.5)
HOG = "import sys; held = bytearray(int(sys.argv[1])); print(len(held))"
MANY = (
    "import os, time; made = 0\n"
    "try:\n"
    "    while made < 100:\n"
    "        made += 1\n"
    "        if not os.fork(): time.sleep(20); os._exit(0)\n"
    "except OSError: pass\n"
    "print(sum(name.isdigit() for name in os.listdir('/proc')))\n"
)
"""Makes processes until it may not, and tells how many there are."""
SPINNING = (
    "import time; used, end = time.process_time(), time.monotonic() + 1.0\n"
    "while time.monotonic() < end: pass\n"
    "print(time.process_time() - used)"
)


@check()
async def every_limit_is_told_by_name(subject: Subject) -> None:
    instance = await subject.create(limits=CAPPED)
    await instance.stop()
    expect(set(instance.limits) == NAMES, f"it names {sorted(instance.limits)}")
    told = {name: status.value for name, status in instance.limits.items()}
    asked = {"memory": 192 * MIB, "pids": 48, "cpu": 0.5, "layer": SMALL.layer_bytes}
    expect(told == asked, f"it tells {told}")


@check()
async def a_limit_that_is_not_enforced_says_why(subject: Subject) -> None:
    instance = await subject.create(limits=CAPPED)
    await instance.stop()
    silent = [name for name, status in instance.limits.items() if not status.enforced and not status.why]
    expect(not silent, f"{silent} give no reason")


@check()
async def a_limit_that_is_enforced_has_no_reason_why_not(subject: Subject) -> None:
    instance = await subject.create(limits=CAPPED)
    await instance.stop()
    odd = [name for name, status in instance.limits.items() if status.enforced and status.why]
    expect(not odd, f"{odd} are enforced and say why not")


@check()
async def no_limit_asked_is_no_limit_told(subject: Subject) -> None:
    instance = await subject.create(limits=Limits(memory_bytes=None, pids=None, cpus=None))
    await instance.stop()
    told = {name: instance.limits[name].value for name in ("memory", "pids", "cpu")}
    expect(set(told.values()) == {None}, f"it tells {told}")


@check(programs=True)
async def an_enforced_memory_limit_ends_a_hog_and_counts_it(subject: Subject) -> None:
    async with subject.box(limits=CAPPED) as box:
        if not box.instance.limits["memory"].enforced:
            return
        if subject.own_kernel:
            await _ends_with_its_hog(subject, box)
            return
        hog = await box.run(subject.python, "-c", HOG, str(1024 * MIB))
        expect(hog.exit_code == 137, f"a hog of 1 GiB ended with {hog.exit_code}: {hog.stdout}{hog.stderr}")
        expect(box.instance.oom_kills() >= 1, "nobody was counted as killed for memory")
        expect(await box.says("echo alive") == "alive", "the sandbox is of no use afterwards")


async def _ends_with_its_hog(subject: Subject, box: Box) -> None:
    """The kernel's memory is its processes', so all of it ends."""
    hog = asyncio.ensure_future(box.run(subject.python, "-c", HOG, str(1024 * MIB)))
    ended = await asyncio.wait_for(box.instance.wait(), 30)
    (outcome,) = await asyncio.gather(hog, return_exceptions=True)
    expect(isinstance(outcome, Exception), f"a hog of 1 GiB gave {outcome}")
    expect(ended.exit_code == 137 and ended.oom_killed, f"its end is told as {ended}")
    expect(box.instance.oom_kills() >= 1, "nobody was counted as killed for memory")


@check(programs=True)
async def memory_below_the_limit_is_given(subject: Subject) -> None:
    async with subject.box(limits=CAPPED) as box:
        modest = await box.run(subject.python, "-c", HOG, str(32 * MIB))
        expect(modest.exit_code == 0, f"32 MiB of 192 ended with {modest.exit_code}")
        expect(box.instance.oom_kills() == 0, "somebody was killed for memory")


@check(programs=True)
async def an_enforced_limit_of_processes_holds(subject: Subject) -> None:
    # As much memory as they want: where they share a kernel of the sandbox's own, its end is the end of all of them.
    async with subject.box(limits=dataclasses.replace(CAPPED, memory_bytes=None)) as box:
        if not box.instance.limits["pids"].enforced:
            return
        if subject.own_kernel:
            alive = int((await box.run(subject.python, "-c", MANY)).stdout)
        else:
            await box.shell("for n in $(seq 100); do sleep 20 & done 2>/dev/null")
            alive = len(box.instance.processes())
        expect(alive <= 49, f"{alive} processes live")


@check(programs=True)
async def an_enforced_processor_limit_holds(subject: Subject) -> None:
    """A kernel of a sandbox's own counts coarsely, and counts what it is kept from: one second of three must do."""
    async with subject.box(limits=CAPPED) as box:
        if not box.instance.limits["cpu"].enforced:
            return
        used_s = [float((await box.run(subject.python, "-c", SPINNING)).stdout)]
        while min(used_s) >= 0.8 and len(used_s) < 3:
            used_s.append(float((await box.run(subject.python, "-c", SPINNING)).stdout))
        expect(min(used_s) < 0.8, f"{min(used_s):.2f} s of processor time in a second at a limit of 0.5")


@check(programs=True)
async def memory_in_address_space_alone_is_not_limited(subject: Subject) -> None:
    """GPU libraries reserve far more than they use."""
    async with subject.box(limits=CAPPED) as box:
        code = (
            "import mmap; mmap.mmap(-1, 64 * 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000); print('ok')"
        )
        reserved = await box.run(subject.python, "-c", code)
        expect(reserved.stdout == "ok\n", f"it ended with {reserved.exit_code}: {reserved.stderr}")


@check(isolated=True)
async def a_full_layer_is_an_error_of_the_guest_alone(subject: Subject) -> None:
    async with subject.box() as box:
        if not box.instance.limits["layer"].enforced:
            return
        for place in ("/tmp", "$HOME"):
            filled = await box.shell(f"head -c {2 * SMALL.layer_bytes} /dev/zero > {place}/full")
            expect(filled.exit_code != 0 and "space" in filled.stderr, f"filling {place} gave {filled}")
            size = int(await box.says(f"stat -c %s {place}/full; rm {place}/full"))
            expect(size <= SMALL.layer_bytes, f"{size} bytes were written to {place}")


@check(isolated=True)
async def the_shared_memory_is_capped(subject: Subject) -> None:
    async with subject.box() as box:
        filled = await box.shell(f"head -c {2 * SMALL.shm_bytes} /dev/zero > /dev/shm/full")
        expect(filled.exit_code != 0 and "space" in filled.stderr, f"filling /dev/shm gave {filled}")


@check(isolated=True)
async def the_run_directory_is_capped(subject: Subject) -> None:
    async with subject.box() as box:
        filled = await box.shell(f"head -c {256 * MIB} /dev/zero > {box.instance.guest_run_directory}/full")
        expect(filled.exit_code != 0 and "space" in filled.stderr, f"filling it gave {filled}")
        expect((await box.channel.hello()).pid <= 2, "the guest does not answer afterwards")
