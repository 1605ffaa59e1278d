"""Floods end bounded, as an error of the guest, while the keeper and its other sandboxes go on."""

import asyncio
import dataclasses
import sys
import time

import pytest

from tests.security.conftest import BACKENDS, OF_THE_HOSTS_KERNEL
from warmcell.sandbox.backends.places import RUN, run_bytes
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import CapacityError
from warmcell.sandbox.models import MIB
from warmcell.sandbox.testing.contract import Box, Subject
from warmcell.sandbox.testing.contract.subject import SMALL

PIDS = 64
CAP_BYTES = 64 * MIB
CAPPED = dataclasses.replace(SMALL, memory_bytes=256 * MIB, pids=PIDS, cpus=0.5)
ANSWER_S = 60.0
FORK_BOMB = """
import os, time
end = time.monotonic() + 60
while time.monotonic() < end:
    try:
        os.fork()
    except OSError:
        time.sleep(0.05)
"""
INODES = """
import os, sys
made = 0
try:
    while made < 200_000:
        os.close(os.open(f"{sys.argv[1]}/{made}", os.O_CREAT | os.O_WRONLY))
        made += 1
except OSError as error:
    print(made, error.errno)
"""


async def answers(box: Box) -> None:
    """A sandbox does what it is asked to."""
    async with asyncio.timeout(ANSWER_S):
        assert await box.says("echo alive") == "alive"


@pytest.mark.parametrize("subject", OF_THE_HOSTS_KERNEL, indirect=True)
async def test_a_fork_bomb_is_held_by_its_limit(subject: Subject) -> None:
    """There are never more processes than allowed, another sandbox answers meanwhile, and stop ends them all."""
    async with subject.box(limits=CAPPED) as other:
        place = subject.place()
        instance = await subject.create(place=place, limits=CAPPED)
        if not instance.limits["pids"].enforced:
            await instance.stop()
            pytest.skip(f"the pids limit is not enforced: {instance.limits['pids'].why}")
        channel = await GuestChannel.open(instance.run_directory)
        async with channel.exec_stream([subject.python, "-c", FORK_BOMB]):
            most = looks = 0
            deadline = time.monotonic() + 30
            while looks < 10 or (most <= 8 and time.monotonic() < deadline):
                await answers(other)
                most = max(most, len(instance.processes()))
                looks += 1
                await asyncio.sleep(0.1)
        await channel.close()
        await instance.stop()
        assert 8 < most <= PIDS + 2
        subject.nothing_is_left(*place)


@pytest.mark.parametrize("subject", OF_THE_HOSTS_KERNEL, indirect=True)
async def test_a_memory_hog_dies_alone(subject: Subject) -> None:
    """Of its own limit: the sandbox stays, and so does its neighbour."""
    async with subject.box(limits=CAPPED) as box, subject.box(limits=CAPPED) as other:
        if not box.instance.limits["memory"].enforced:
            pytest.skip(f"the memory limit is not enforced: {box.instance.limits['memory'].why}")
        hog = await box.run(subject.python, "-c", "x = [bytearray(2**20) for _ in range(2000)]")
        assert hog.exit_code == 137
        assert box.instance.oom_kills() >= 1
        assert other.instance.oom_kills() == 0
        await answers(box)
        await answers(other)


@pytest.mark.parametrize("subject", OF_THE_HOSTS_KERNEL, indirect=True)
async def test_memory_hidden_in_files_counts_too(subject: Subject) -> None:
    """/dev/shm is memory of the sandbox, below its own limit. Nobody can give it back, so the sandbox itself ends."""
    limits = dataclasses.replace(CAPPED, shm_bytes=1024 * MIB)
    async with subject.box(limits=CAPPED) as other, subject.box(limits=limits) as box:
        if not box.instance.limits["memory"].enforced:
            pytest.skip(f"the memory limit is not enforced: {box.instance.limits['memory'].why}")
        hoard = asyncio.ensure_future(box.shell("head -c 800000000 /dev/zero > /dev/shm/hoard"))
        ended = await asyncio.wait_for(box.instance.wait(), 60)
        assert (ended.exit_code, ended.oom_killed) == (137, True)
        assert isinstance((await asyncio.gather(hoard, return_exceptions=True))[0], Exception)
        await answers(other)


@pytest.mark.parametrize("place", ["/tmp", "/dev/shm", RUN, "$HOME"])
async def test_a_disk_fill_ends_at_the_cap(subject: Subject, place: str) -> None:
    """Every place that can be written is bounded, and the host has as much room as before."""
    async with subject.box() as box:
        if subject.own_kernel and sys.prefix.startswith(f"{place}/"):
            pytest.skip(f"the environment lies in {place}, which is memory of that kernel then")
        await fills_up(box, place, run_bytes(SMALL) if place == RUN else CAP_BYTES)


@pytest.mark.parametrize("subject", [BACKENDS["bubblewrap"]], indirect=True)
async def test_a_fill_of_the_environment_ends_at_the_cap(subject: Subject) -> None:
    """So is the layer above it, elsewhere than in containers, which have none."""
    async with subject.box() as box:
        if (await box.shell(f"touch {sys.prefix}/lib/full")).exit_code:
            pytest.skip("this environment is read-only")
        if not box.instance.limits["layer"].enforced:
            pytest.skip(f"the layer is not capped: {box.instance.limits['layer'].why}")
        await fills_up(box, f"{sys.prefix}/lib")


async def fills_up(box: Box, place: str, cap_bytes: int = CAP_BYTES) -> None:
    """It takes no more than its cap, and says so."""
    filled = await box.shell(f"head -c 300000000 /dev/zero > {place}/full")
    assert filled.exit_code != 0
    assert "No space left" in filled.stderr
    assert int(await box.says(f"stat -c %s {place}/full")) <= cap_bytes
    assert await box.says("echo alive") == "alive"


@pytest.mark.parametrize("subject", OF_THE_HOSTS_KERNEL, indirect=True)
@pytest.mark.parametrize("place", ["/tmp", "/dev/shm", "/run/warmcell"])
async def test_a_flood_of_files_ends_at_the_cap(subject: Subject, place: str) -> None:
    """Empty files take memory of the kernel, which no size says."""
    async with subject.box() as box:
        flood = await box.run(subject.python, "-c", INODES, place)
        made, code = flood.stdout.split()
        assert (int(made) < 70_000, code) == (True, "28")
        assert await box.says("echo alive") == "alive"


async def test_a_flood_of_output_is_an_error_and_costs_no_memory(subject: Subject) -> None:
    """What a command prints is held only up to the cap that was asked for."""
    async with subject.box() as box:
        with pytest.raises(CapacityError):
            await box.channel.exec(["cat", "/dev/zero"], timeout=60, output_max_bytes=8 * MIB)
        assert await box.says("echo alive") == "alive"


@pytest.mark.parametrize("subject", OF_THE_HOSTS_KERNEL, indirect=True)
async def test_a_busy_sandbox_leaves_the_other_its_share(subject: Subject) -> None:
    """At half a processor it cannot take both."""
    async with subject.box(limits=CAPPED) as box, subject.box(limits=CAPPED) as other:
        if not box.instance.limits["cpu"].enforced:
            pytest.skip(f"the cpu limit is not enforced: {box.instance.limits['cpu'].why}")
        spin = f"import os, time\n{3 * 'os.fork();'}end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
        async with box.channel.exec_stream([subject.python, "-c", spin]):
            for _ in range(5):
                await answers(other)
