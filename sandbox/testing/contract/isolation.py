"""What a guest is, sees and reaches."""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from warmcell.sandbox.testing.contract.subject import Register, Subject, expect, variables

check = Register()

ENVIRONMENT = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TMPDIR", "PWD", "SHLVL", "OLDPWD", "_"}
"""What a guest may have in its environment; the last four are the shell's own."""
STATUS = (
    "import ctypes, json\ntold = dict(line.split(':\\t') for line in open('/proc/self/status') if ':\\t' in line)\n"
    "told['NoNewPrivs'] = str(ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))\nprint(json.dumps(told))"
)
DESCRIPTORS = (
    "import os\nfor fd in os.listdir('/proc/self/fd'):\n"
    " print(os.readlink(f'/proc/self/fd/{fd}') if fd != '3' else 'the listing itself')"
)
LOOPBACK = (
    "import socket; server = socket.create_server(('127.0.0.1', 0))\n"
    "socket.create_connection(server.getsockname()); print('ok')"
)
ASK = (
    "import socket, sys; there = socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=60)\n"
    "there.sendall(b'ping'); there.shutdown(socket.SHUT_WR)\n"
    "print(b''.join(iter(lambda: there.recv(99), b'')).decode())"
)
ASKED_PORT = 43129
CONNECT = (
    "import socket, sys\n"
    "try: socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=5).close()\n"
    "except OSError as error: sys.exit(f'{error}')\n"
)


@check(programs=True, isolated=False)
async def without_isolation_it_says_so_and_runs_as_the_user(subject: Subject) -> None:
    async with subject.box() as box:
        expect(await box.says("id -u") == str(os.getuid()), "it runs as somebody else")


@check(isolated=True)
async def the_guest_is_not_root(subject: Subject) -> None:
    async with subject.box(workspace=subject.folder("work")) as box:
        uid = int(await box.says("id -u"))
        expect(uid != 0 and int(await box.says("id -g")) != 0, "it is root")
        owner = subject.folder("work").stat().st_uid
        expect(uid == os.getuid() if os.getuid() else uid != owner, f"it is uid {uid}")
        expect(await box.says("id -G | wc -w") == "1", "it has further groups")


@check(isolated=True)
async def the_guest_has_no_capabilities_and_can_gain_none(subject: Subject) -> None:
    async with subject.box() as box:
        status = json.loads((await box.run(subject.python, "-c", STATUS)).stdout)
        sets = {name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd")}
        sets["CapAmb"] = int(status.get("CapAmb", "0"), 16)  # Not every kernel has such a set.
        expect(not any(sets.values()), f"it has {sets}")
        expect(status["NoNewPrivs"].strip() == "1", "it can gain privileges")
        expect(status["Seccomp"].strip() == "2", "it has no system call filter")


@check(isolated=True)
async def init_and_what_is_before_it_have_given_up_everything_as_well(subject: Subject) -> None:
    async with subject.box() as box:
        init = (await box.channel.hello()).pid
        for pid in range(1, init + 1):
            lines = await box.says(f"cat /proc/{pid}/status")
            status = dict(line.split(":\t", 1) for line in lines.splitlines() if ":\t" in line)
            expect(int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0, f"process {pid} has capabilities")
            if "NoNewPrivs" in status or not subject.own_kernel:  # Else what comes from init shows that it has it.
                expect(status["NoNewPrivs"].strip() == "1", f"process {pid} can gain privileges")
        expect(int(status["CapBnd"], 16) == 0 and status["Seccomp"].strip() == "2", "init has more than its guests")
        expect("\t0" not in "\t" + status["Uid"], f"init is {status['Uid']}")
        open_files = (await box.says(f"ls /proc/{init}/fd | sort -n | head -3 | tr '\\n' ' '")).split()
        expect(open_files == ["0", "1", "2"], f"its descriptors are {open_files}")


@check(isolated=True)
async def no_descriptor_of_the_host_is_inherited(subject: Subject) -> None:
    async with subject.box() as box:
        leads = (await box.run(subject.python, "-c", DESCRIPTORS)).stdout.splitlines()
        foreign = [lead for lead in leads[:-1] if not lead.startswith(("pipe:", "/dev/null"))]
        expect(len(leads) == 4 and not foreign, f"a command has {leads}")


@check(isolated=True)
async def the_environment_is_only_what_a_guest_needs(subject: Subject) -> None:
    os.environ["WARMCELL_CONTRACT_SECRET"] = "secret"
    try:
        async with subject.box() as box:
            found = variables(await box.says("env"))
    finally:
        del os.environ["WARMCELL_CONTRACT_SECRET"]
    expect(set(found) <= ENVIRONMENT, f"it also has {sorted(set(found) - ENVIRONMENT)}")
    expect(found["HOME"].startswith(("/home/", "/var/home/")), f"its home is {found['HOME']}")


@check(isolated=True, needs=lambda subject: subject.own_kernel)
async def the_guests_kernel_is_not_the_hosts(subject: Subject) -> None:
    async with subject.box() as box:
        inside = await box.says("cat /proc/version")
    expect(inside != Path("/proc/version").read_text().strip(), "it has the host's")


@check(isolated=True, needs=lambda subject: not subject.own_kernel)
async def the_guest_has_namespaces_of_its_own(subject: Subject) -> None:
    kinds = ["mnt", "pid", "ipc", "uts", "net", "cgroup"]
    async with subject.box() as box:
        inside = (await box.says(f"cd /proc/self/ns; for kind in {' '.join(kinds)}; do readlink $kind; done")).split()
    outside = [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds]
    shared = [kind for kind, one, other in zip(kinds, inside, outside, strict=True) if one == other]
    expect(not shared, f"it shares {shared} with the host")


@check(isolated=True)
async def only_its_own_processes_are_in_sight(subject: Subject) -> None:
    async with subject.box() as one, subject.box() as other, other.channel.exec_stream(["sleep", "54321"]):
        seen = await one.says("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        expect("54321" not in seen, "it sees another sandbox's process")
        expect((await one.channel.hello()).pid <= 2, "init is not among the first processes")
        expect((await one.shell(f"kill -0 {os.getpid()}")).exit_code != 0, "it can signal the host's")


@check(isolated=True)
async def the_hostname_is_its_own(subject: Subject) -> None:
    async with subject.box() as box:
        expect(await box.says("uname -n") != socket.gethostname(), "it has the host's name")


@check(isolated=True)
async def without_network_no_port_of_the_host_is_reached(subject: Subject) -> None:
    async with _listening() as port, subject.box(network="none") as box:
        reached = await box.run(subject.python, "-c", CONNECT, str(port))
        expect(reached.exit_code != 0, "it was reached")
        devices = await box.says("cat /proc/net/dev | tail -n +3 | cut -d: -f1 | tr -d ' '")
        expect(devices == "lo", f"it has {devices}")


@check(isolated=True)
async def without_network_its_own_loopback_works(subject: Subject) -> None:
    async with subject.box(network="none") as box:
        said = await box.run(subject.python, "-c", LOOPBACK)
        expect(said.stdout == "ok\n", f"it does not: {said.stderr}")


@check(isolated=True)
async def without_network_its_programs_speak_with_whom_the_host_sends(subject: Subject) -> None:
    async with subject.box(network="none") as box:

        async def answer() -> None:
            async with box.channel.accept(ASKED_PORT) as (reader, writer):
                writer.write(await reader.read() + b" pong")
                await writer.drain()

        await box.channel.listen(ASKED_PORT)
        answering = asyncio.create_task(answer())
        said = await box.run(subject.python, "-c", ASK, str(ASKED_PORT))
        await answering
        expect(said.stdout == "ping pong\n", f"it heard {said.stdout}{said.stderr}")


@check(programs=True, needs=lambda subject: "host" in subject.backend.capabilities.networks)
async def with_the_hosts_network_its_ports_are_reached(subject: Subject) -> None:
    async with _listening() as port, subject.box(network="host") as box:
        reached = await box.run(subject.python, "-c", CONNECT, str(port))
        expect(reached.exit_code == 0, f"it was not: {reached.stderr}")


@check(isolated=True)
async def without_network_no_name_server_is_told(subject: Subject) -> None:
    async with subject.box(network="none") as box:
        expect((await box.shell("cat /etc/resolv.conf")).exit_code != 0, "the host's name server is told")


@check(isolated=True)
async def abstract_sockets_of_the_host_are_not_reached(subject: Subject) -> None:
    name = f"\0warmcell-contract-{os.getpid()}"
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({name!r})"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(name)
        listening.listen()
        async with subject.box(network="none") as box:
            expect((await box.run(subject.python, "-c", code)).exit_code != 0, "it was reached")


@check(isolated=True)
async def other_users_of_the_machine_are_not_told(subject: Subject) -> None:
    async with subject.box() as box:
        names = (await box.says("cut -d: -f1 /etc/passwd")).split()
        expect(set(names) <= {"root", "nobody", await box.says("id -un")}, f"it knows {names}")


@check(isolated=True)
async def devices_are_the_harmless_ones(subject: Subject) -> None:
    async with subject.box() as box:
        nodes = set((await box.says("find /dev -type b -o -type c | sort")).split())
        harmless = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "pts/ptmx")}
        if subject.own_kernel:  # They are that kernel's.
            harmless |= {"/dev/fuse", "/dev/net/tun"}
        expect(nodes <= harmless, f"it has {sorted(nodes - harmless)}")


@check(isolated=True)
async def a_terminal_can_be_had(subject: Subject) -> None:
    async with subject.box() as box, box.channel.exec_stream(["tty"], pty=(24, 80)) as process:
        said = b"".join([content async for _, content in process.output()])
        expect(said.startswith(b"/dev/pts/"), f"tty says {said!r}")


@check(isolated=True)
async def no_sandbox_can_be_made_in_a_sandbox(subject: Subject) -> None:
    async with subject.box() as box:
        for script in ("unshare --user true", "unshare --mount true", "mount -t tmpfs none /tmp", "unshare --net true"):
            expect((await box.shell(script)).exit_code != 0, f"{script!r} succeeded")


@contextlib.asynccontextmanager
async def _listening() -> AsyncIterator[int]:
    """A port of the host on which somebody listens."""
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await server.wait_closed()
