"""What keepers that were killed have left: processes, control groups, directories."""

import contextlib
import os
import signal

from warmcell.sandbox.backends import cgroups, processes
from warmcell.sandbox.backends.cgroups import Cgroups
from warmcell.sandbox.backends.docker.orphans import remove_orphans
from warmcell.sandbox.backends.files import remove_tree
from warmcell.sandbox.backends.process import MARK
from warmcell.sandbox.paths import Paths

GRACE_S = 30.0


def clean_leftovers(paths: Paths) -> list[str]:
    """Remove what is without a living keeper; called by a keeper before it makes anything. Blocks.

    Sandboxes end with their keeper, so what there is of them below `paths` is left over; groups and processes of other
    living keepers are left alone.

    Returns:
        What was removed, a line each.
    """
    removed: list[str] = []
    for pid, mark in processes.bearing(MARK):
        if _keeper_is_gone(mark):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                removed.append(f"process {pid} of a killed keeper")
    for group in cgroups.leftovers(Cgroups().parents()):
        if group.remove_within(GRACE_S):
            removed.append(f"control group {group.entrances[0].parent}")
    removed += remove_orphans(paths)
    for kind, parent in (("run directory", paths.sandboxes), ("layer", paths.layers)):
        for directory in sorted(parent.glob("*")):
            remove_tree(directory)
            removed.append(f"{kind} {directory}")
    return removed


def _keeper_is_gone(mark: str) -> bool:
    """Whether the keeper that a mark (`PID.START-ID`) names has ended."""
    pid, _, began = mark.partition("-")[0].partition(".")
    return pid.isdigit() and began.isdigit() and processes.start_time(int(pid)) != int(began)
