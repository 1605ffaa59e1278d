"""E2B's control plane: what sandboxes use, and what has run in them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from warmcell.extension.server.e2b import shapes
from warmcell.extension.server.e2b.control import ONE, all_of, info_in
from warmcell.extension.server.e2b.handler import E2bHandler, Verb
from warmcell.sandbox.errors import InvalidRequestError

SAMPLES_MAX: Final = 1024
"""Sandboxes whose last sample is kept."""


async def metrics(request: E2bHandler) -> None:
    """What it uses. Processors are counted since it was asked before, or since it was made."""
    info = await info_in(request)
    sample = await metric_of(request, info)
    begin, end = (_whole(request, name) for name in ("start", "end"))
    late = begin is not None and sample["timestampUnix"] < begin
    request.answer([] if late or (end is not None and sample["timestampUnix"] > end) else [sample])


async def all_metrics(request: E2bHandler) -> None:
    """The same of several."""
    asked = (request.argument("sandbox_ids") or "").split(",")
    running = [info for info in await all_of(request) if shapes.state_of(info) == "running"]
    found = {info["id"]: await metric_of(request, info) for info in running if info["id"] in asked}
    request.answer({"sandboxes": found})


async def logs(request: E2bHandler) -> None:
    """The processes that were started in it, and how they ended."""
    info = await info_in(request)
    done = await request.keeper.ask("GET", f"/sandboxes/{info['id']}/commands")
    entries = shapes.log_entries([one for one in done["commands"] if not one["tag"].startswith("e2b.")])
    newer = bool(request.request.path.rpartition("/v2/")[1])
    entries = shapes.asked_of_log(
        entries,
        since_ms=_whole(request, "cursor" if newer else "start"),
        most=_whole(request, "limit"),
        **({name: request.argument(name) or "" for name in ("direction", "level", "search")} if newer else {}),
    )
    if newer:
        request.answer({"logs": entries})
    else:
        lines = [{"timestamp": entry["timestamp"], "line": entry["message"]} for entry in entries]
        request.answer({"logs": lines, "logEntries": entries})


def _whole(request: E2bHandler, name: str) -> int | None:
    """A whole number of the query: a Unix time, or how many."""
    asked = request.argument(name)
    if asked is not None and not re.fullmatch(r"[0-9]{1,15}", asked):
        raise InvalidRequestError(f"{name} must be a whole number", hint="Times are Unix times.")
    return None if asked is None else int(asked)


async def metric_of(request: E2bHandler, info: Mapping[str, Any]) -> dict[str, Any]:
    """One sample of what a sandbox uses."""
    samples: dict[str, Mapping[str, Any]] = request.settings.setdefault("warmcell_e2b_samples", {})
    sample = await request.keeper.ask("GET", f"/sandboxes/{info['id']}/metrics", params={"disk": "1"})
    before = samples.pop(info["id"], {"at": info["created_at"], "cpu_s": 0.0})
    samples[info["id"]] = sample
    if len(samples) > SAMPLES_MAX:
        del samples[next(iter(samples))]
    layer = info["limits"].get("layer")
    return shapes.metric(sample, before, None if layer is None else layer["value"])


VERBS: Final[Sequence[Verb]] = (
    Verb("control", "GET", r"/sandboxes/metrics", all_metrics),
    Verb("control", "GET", rf"{ONE}/metrics", metrics),
    Verb("control", "GET", rf"(/v2)?{ONE}/logs", logs),
)
