"""Carrying out one plan."""

from __future__ import annotations

import _socket
import fcntl
import marshal
import os
import resource
import sys

from .alone import be_first
from .choices import choose
from .linux import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, Refused, call, libc, load_filter
from .mounts import make_mounts, open_handles
from .saying import answer, quoted, receive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def main(fd: int) -> None:
    """Carry out the plan that comes on `fd`."""
    control = _socket.socket(fileno=fd)
    step = "read the plan"
    try:
        size = int.from_bytes(receive(control, 8), "big")
        plan = marshal.loads(receive(control, size))  # noqa: S302  # It comes from the keeper that started this.
        step = "join its control group"
        for file in plan["cgroups"]:
            with open(file, "w") as procs:
                procs.write("0")
        report: dict[str, Any] | None = None
        if plan.get("nest"):
            from .nest import enter

            if os.geteuid() == 0:
                # In a nest of root's nobody has root's rights: what only root may show or open, it does before.
                step = "make its mounts"
                report = make_mounts(plan["mounts"], for_others=True)
            step = "enter the nest"
            enter(control)
        elif plan.get("alone"):
            step = "be the first process of its pid namespace"
            be_first(control, *plan["alone"])
        call("die with the keeper", libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0))
        # From another pid namespace the keeper cannot be seen; that it is gone shows when it is answered.
        if os.getppid() not in (0, plan["keeper"]):
            sys.exit(1)
        if plan["session"]:
            os.setsid()
            call("adopt orphans", libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        handles: list[int] = []
        if plan["mounts"] is not None:
            step = "make its mounts"
            report = make_mounts(plan["mounts"]) if report is None else report
            handles = open_handles(plan["mounts"])
        report = report or {}
        if plan.get("filter"):
            load_filter(plan["filter"])
        argv = [word for part in plan["argv"] for word in choose(part, report)]
        step = f"start {argv[0]}"
        trees = ", ".join(f"{quoted(name)}: {quoted(why)}" for name, why in report.items())
        answer(control, f'"stage": {{{trees}}}', handles)
        if plan["most_processes"] is not None:
            resource.setrlimit(resource.RLIMIT_NPROC, (plan["most_processes"],) * 2)
        hand_on(control, plan["inherit"])
        os.execve(argv[0], argv, plan["env"])
    except Refused as error:
        answer(control, f'"failed": {quoted(error.step)}, "errno": {error.errno}')
    except OSError as error:
        answer(control, f'"failed": {quoted(step)}, "errno": {error.errno or 0}')
    sys.exit(1)


def hand_on(control: _socket.socket, inherit: Mapping[str, Any]) -> None:
    """Let what is executed have the control socket, and files with the given content, under the numbers it expects.

    Whatever else is open closes at exec.
    """
    kept = {int(number): fcntl.fcntl(control.fileno(), fcntl.F_DUPFD_CLOEXEC, 64) for number in inherit["control"]}
    for number, content in inherit["files"].items():
        made = os.memfd_create("warmcell")
        os.write(made, content)
        os.lseek(made, 0, os.SEEK_SET)
        kept[int(number)] = fcntl.fcntl(made, fcntl.F_DUPFD_CLOEXEC, 64)
    os.set_inheritable(control.fileno(), False)
    for number, fd in kept.items():
        os.dup2(fd, number)
