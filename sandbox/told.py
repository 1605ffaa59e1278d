"""What a sandbox's end and its guest's words become before anybody is told of them."""

import dataclasses
import math
from collections.abc import Sequence

from warmcell.sandbox import errors
from warmcell.sandbox.backends.base import ExitInfo
from warmcell.sandbox.models import TemplateStatus

TEXT_MAX = 500
"""Characters of a guest's own text that are passed on."""

MORE_MEMORY = "Give the notebook more memory in the Warmcell menu and restart, or load less at a time."


def end_of(kind: type[errors.WarmcellError], who: str, ended: ExitInfo, *, hint: str) -> errors.WarmcellError:
    """The error that a sandbox's end by itself stands for, with the last thing that it said."""
    how = "was killed for memory" if ended.oom_killed else f"ended with exit code {ended.exit_code}"
    words = ended.message.strip().splitlines()
    last = f": {words[-1].strip()[:TEXT_MAX]}" if words else ""
    return kind(
        f"{who} {how}{last}",
        hint=MORE_MEMORY if ended.oom_killed else hint,
        details={"exit_code": ended.exit_code, "oom_killed": ended.oom_killed},
    )


def plausible(said: TemplateStatus, preload: Sequence[str]) -> TemplateStatus:
    """What a guest tells of its template, cut down to what can be: pages show it, and it may come from anybody."""
    return dataclasses.replace(
        said,
        name=said.name[:TEXT_MAX],
        importing=said.importing[:TEXT_MAX],
        since=said.since if math.isfinite(said.since) else 0.0,
        seconds=said.seconds if math.isfinite(said.seconds) else 0.0,
        imported=tuple(name for name in preload if name in said.imported),
        failed={name[:TEXT_MAX]: why[:TEXT_MAX] for name, why in list(said.failed.items())[: len(preload) + 1]},
    )
