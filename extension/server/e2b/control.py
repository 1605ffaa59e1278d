"""E2B's control plane: sandboxes that come, are listed, pause, fork and go."""

import base64
import binascii
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote

from warmcell.extension.server.e2b import failures, shapes
from warmcell.extension.server.e2b.handler import E2bHandler, Verb
from warmcell.sandbox.errors import (
    ConflictError,
    InvalidRequestError,
    NoGpuAvailableError,
    NotFoundError,
    OperationTimeoutError,
    SandboxDiedError,
    UnsupportedOperationError,
    WarmcellError,
)
from warmcell.sandbox.ids import known_sandbox_id

FORKS_MAX: Final = 64
PAGE_MAX: Final = 1000
RELEASE_S: Final = 1.0
"""How long about a sandbox whose time is over takes to be gone."""

_KEY = re.compile(r"[A-Za-z0-9_-]{1,255}")


async def create(request: E2bHandler) -> None:
    """A new sandbox: of a usual template, of an image, or that goes on from a snapshot."""
    key = request.request.headers.get("Idempotency-Key")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidRequestError("Idempotency-Key must be 1 to 255 of A-Z, a-z, 0-9, _ and -", hint="Take a UUID.")
    public = bool(request.settings.get("warmcell_e2b_public_ports"))
    wanted = shapes.new_sandbox(await request.body_stream.fields(), internet=_internet(request), public=public)
    body: dict[str, Any] = {"terms": wanted.terms}
    snapshot = None if wanted.usual else await _snapshot(request, wanted.name)
    if snapshot is not None:
        if wanted.gpu is not None:
            raise UnsupportedOperationError("A sandbox from a snapshot has the GPU of that", hint="Leave gpu out.")
        body.update(snapshot=snapshot, spec={"env": dict(wanted.env)} if wanted.env else {})
    else:
        if not wanted.usual:
            await _check_image(request, wanted.name)
        body["spec"] = {
            "env": dict(wanted.env),
            "user": shapes.USER,
            **({"network": wanted.network} if wanted.network else {}),
            **({"gpu": wanted.gpu} if wanted.gpu else {}),
            **({} if wanted.usual else {"image": wanted.name}),
        }
    try:
        info = await request.keeper.ask("POST", "/sandboxes", body, key=key)
    except NoGpuAvailableError as error:
        raise await _with_estimate(request, error) from error
    if snapshot is not None and wanted.network is not None:
        path = f"/sandboxes/{info['id']}"
        try:
            info = await request.keeper.ask("PATCH", path, {"network": wanted.network})
        except WarmcellError:
            await request.keeper.ask("DELETE", path)
            raise
    request.answer(shapes.sandbox(info, request.keys), 201)


async def _with_estimate(request: E2bHandler, error: NoGpuAvailableError) -> NoGpuAvailableError:
    """With the time after which one of the caller's own sandboxes gives a GPU back, if it is known."""
    ends = [info["terms"]["ends_at"] for info in await all_of(request) if info["gpu"] is not None]
    known = [at for at in ends if at is not None]
    if known:
        error.details["retry_after_s"] = max(0.0, min(known) - _now()) + RELEASE_S
    return error


async def connect(request: E2bHandler) -> None:
    """Wake it if it sleeps, and let it run for at least that long from now on."""
    body = await request.body_stream.fields()
    memory = body.flag("memory") is not False
    info = await info_in(request)
    await request.keeper.check_run()  # The answer has the token that opens the sandbox.
    timeout = shapes.timeout_of(body) or shapes.TIMEOUT_S
    slept = shapes.state_of(info) == "paused"
    ends_at = info["terms"]["ends_at"]
    if slept:
        asked = {"timeout_s": timeout, "memory": memory}
        info = await request.keeper.ask("POST", f"/sandboxes/{info['id']}/connect", asked)
    elif ends_at is not None and ends_at < _now() + timeout:
        info = await request.keeper.ask("PATCH", f"/sandboxes/{info['id']}", {"timeout_s": timeout})
    request.answer(shapes.sandbox(info, request.keys), 201 if slept else 200)


async def info_of(request: E2bHandler) -> None:
    """One of them; with the token that opens it for whoever may run code there."""
    info = await info_in(request)
    request.answer(shapes.detail(info, request.keys if await request.keeper.may_run() else None))


async def kill(request: E2bHandler) -> None:
    """End it."""
    info = await info_in(request)
    await request.keeper.ask("DELETE", f"/sandboxes/{info['id']}")
    request.answer(None, 204)


async def list_them(request: E2bHandler) -> None:
    """Page by page. Each page begins after the last sandbox of the one before, so that none is missed or told twice."""
    found = [info for info in await all_of(request) if _is_asked_for(request, info)]
    newest_first = request.argument("order") != "asc"
    found.sort(key=_place, reverse=newest_first)
    after = _cursor(request.argument("nextToken"))
    if after is not None:
        found = [info for info in found if (_place(info) < after if newest_first else _place(info) > after)]
    limit = _limit(request)
    page = found[:limit]
    if len(found) > limit:
        created_at, sandbox_id = _place(page[-1])
        token = base64.urlsafe_b64encode(f"{created_at!r} {sandbox_id}".encode()).decode()
        request.set_header("x-next-token", token)
    request.answer([shapes.listed(info) for info in page])


async def set_timeout(request: E2bHandler) -> None:
    """From now on it runs for that long, be it more or less than before."""
    timeout = shapes.timeout_of(await request.body_stream.fields())
    if timeout is None:
        raise InvalidRequestError("timeout is missing", hint="Give it in seconds.")
    await _set_timeout(request, timeout)


async def refresh(request: E2bHandler) -> None:
    """As `set_timeout`, by its older name."""
    duration = shapes.timeout_of(await request.body_stream.fields(), "duration")
    await _set_timeout(request, shapes.TIMEOUT_S if duration is None else duration)


async def pause(request: E2bHandler) -> None:
    """Its memory and files go to disk, in the middle of whatever it does; or its files alone."""
    body = await request.body_stream.fields()
    asked, strict = {"busy": True, "memory": body.flag("memory") is not False}, body.flag("requireHealthyGuest")
    info = await info_in(request)
    if shapes.state_of(info) == "paused":
        raise ConflictError(f"Sandbox {info['id']} is paused already", hint="Connect to it to have it run.")
    try:
        await request.keeper.ask("POST", f"/sandboxes/{info['id']}/suspend", asked)
    except (OperationTimeoutError, SandboxDiedError) as error:
        if not strict:
            raise
        request.answer(failures.body(409, str(error), failures.UNRESPONSIVE), 409)
    else:
        request.answer(None, 204)


async def resume(request: E2bHandler) -> None:
    """As `connect`, for older clients; of one that runs it is a mistake."""
    body = await request.body_stream.fields()
    info = await info_in(request)
    if shapes.state_of(info) == "running":
        raise ConflictError(f"Sandbox {info['id']} is running already", hint="Connect to it.")
    timeout = shapes.timeout_of(body) or shapes.TIMEOUT_S
    info = await request.keeper.ask("POST", f"/sandboxes/{info['id']}/connect", {"timeout_s": timeout})
    request.answer(shapes.sandbox(info, request.keys), 201)


async def fork(request: E2bHandler) -> None:
    """Copies of its memory and files; it runs on."""
    body = await request.body_stream.fields()
    count, timeout = body.whole("count", most=FORKS_MAX), shapes.timeout_of(body)
    info = await info_in(request)
    await request.keeper.check_run()
    done = await request.keeper.ask("POST", f"/sandboxes/{info['id']}/fork", {"n": 1 if count is None else count})
    answers = []
    for clone in done["sandboxes"]:
        try:
            if timeout is not None:
                clone = await request.keeper.ask("PATCH", f"/sandboxes/{clone['id']}", {"timeout_s": timeout})
            answers.append({"sandbox": shapes.sandbox(clone, request.keys)})
        except WarmcellError as error:
            answers.append({"error": failures.control(error)[1]})
    request.answer(answers, 201)


async def snapshot(request: E2bHandler) -> None:
    """Save its memory and files; it runs on."""
    body = await request.body_stream.fields()
    info = await info_in(request)
    asked = {"name": body.text("name", most=128), "memory": body.flag("memory") is not False}
    saved = await request.keeper.ask("POST", f"/sandboxes/{info['id']}/snapshot", asked)
    request.answer(_shown(saved), 201)


async def snapshots(request: E2bHandler) -> None:
    """Those that somebody has asked for, the newest first."""
    sandbox_id = request.argument("sandboxID")
    params = {"sandbox_id": sandbox_id} if sandbox_id else {}
    found = (await request.keeper.ask("GET", "/snapshots", params=params))["snapshots"]
    name = request.argument("name")
    found = [one for one in found if one["kind"] == "named" and name in (None, one["name"], one["id"])]
    found.sort(key=_place, reverse=True)
    after = _cursor(request.argument("nextToken"))
    found = [one for one in found if after is None or _place(one) < after]
    limit = _limit(request)
    if len(found) > limit:
        created_at, snapshot_id = _place(found[limit - 1])
        request.set_header("x-next-token", base64.urlsafe_b64encode(f"{created_at!r} {snapshot_id}".encode()).decode())
    request.answer([_shown(one) for one in found[:limit]])


async def delete_snapshot(request: E2bHandler) -> None:
    """A snapshot is a template here, so that is how it is deleted."""
    await request.keeper.ask("DELETE", f"/snapshots/{request.groups['template']}")
    request.answer(None, 204)


async def network(request: E2bHandler) -> None:
    """What it reaches from now on, instead of until now."""
    body = await request.body_stream.fields()
    info = await info_in(request)
    policy = shapes.policy(body, body, internet=_internet(request))
    await request.keeper.ask("PATCH", f"/sandboxes/{info['id']}", {"network": policy or "none"})
    request.answer(None, 204)


async def unbuilt(request: E2bHandler) -> None:
    """What E2B has and Warmcell has not."""
    what = request.groups["noun"]
    raise UnsupportedOperationError(f"{what.capitalize()} are not part of Warmcell", hint=_INSTEAD[what])


_INSTEAD: Mapping[str, str] = {
    "templates": "Build an image with `warmcell images build`, or snapshot a prepared sandbox; either is a template.",
    "volumes": "Write files into the sandbox; snapshots keep them.",
    "secrets": "Give environment variables when the sandbox is created.",
}


async def info_in(request: E2bHandler) -> Mapping[str, Any]:
    """The sandbox in the path; raises SandboxNotFoundError."""
    asked = request.groups["sandbox"]
    sandbox_id = known_sandbox_id(asked)
    if sandbox_id is None:
        raise failures.unknown_sandbox(asked)
    info: Mapping[str, Any] = await request.keeper.ask("GET", f"/sandboxes/{sandbox_id}")
    if not shapes.is_shown(info):
        raise failures.unknown_sandbox(asked)
    return info


async def all_of(request: E2bHandler) -> list[Mapping[str, Any]]:
    """Those that exist for whoever asks."""
    infos = (await request.keeper.ask("GET", "/sandboxes"))["sandboxes"]
    return [info for info in infos if shapes.is_shown(info)]


def _is_asked_for(request: E2bHandler, info: Mapping[str, Any]) -> bool:
    states = request.argument("state")
    if states is None and not request.request.path.rpartition("/v2/")[1]:
        states = "running"  # what the older path lists
    if states and shapes.state_of(info) not in states.split(","):
        return False
    asked = parse_qsl(request.argument("metadata") or "", keep_blank_values=True)
    has = shapes.metadata_of(info)
    if any(has.get(unquote(key)) != unquote(value) for key, value in asked):  # clients quote twice
        return False
    template, since = request.argument("template"), request.argument("startedAfter")
    if template and shapes.template_of(info) not in template.split(","):
        return False
    return since is None or round(info["created_at"], 6) >= round(_time(since), 6)


async def _snapshot(request: E2bHandler, ref: str) -> str | None:
    """The id of the snapshot that a template names, if it names one."""
    try:
        found = await request.keeper.ask("GET", f"/snapshots/{ref}") if re.fullmatch(r"[\w.-]+", ref) else None
    except NotFoundError:
        return None
    return None if found is None else str(found["id"])


async def _check_image(request: E2bHandler, name: str) -> None:
    """Raises NotFoundError where no image of that name was built here. Its existence is no secret of the user's."""
    try:
        await request.link.get(f"/images/{quote(name, safe='')}")
    except NotFoundError as error:
        raise NotFoundError(
            f"There is no template {name!r}",
            hint=f"Take {' or '.join(shapes.USUAL_TEMPLATES[:2])} (with :A100 or the like for a GPU), a snapshot, or "
            "an image of `warmcell images build`.",
        ) from error


async def _set_timeout(request: E2bHandler, seconds: int) -> None:
    info = await info_in(request)
    if seconds == 0:  # which ends it, one way or the other, at once
        verb = "suspend" if info["terms"]["on_timeout"] == "suspend" else None
        path = f"/sandboxes/{info['id']}"
        await (
            request.keeper.ask("POST", f"{path}/{verb}", {"busy": True}) if verb else request.keeper.ask("DELETE", path)
        )
    else:
        await request.keeper.ask("PATCH", f"/sandboxes/{info['id']}", {"timeout_s": seconds})
    request.answer(None, 204)


def _internet(request: E2bHandler) -> bool:
    return bool(request.settings.get("warmcell_e2b_internet"))


def _shown(info: Mapping[str, Any]) -> dict[str, Any]:
    return {"snapshotID": info["id"], "names": [info["name"]] if info["name"] else []}


def _place(info: Mapping[str, Any]) -> tuple[float, str]:
    return float(info["created_at"]), str(info["id"])


def _cursor(token: str | None) -> tuple[float, str] | None:
    if not token:
        return None
    try:
        created_at, _, one = base64.urlsafe_b64decode(token.encode()).decode().partition(" ")
        return float(created_at), one
    except (binascii.Error, ValueError):
        raise InvalidRequestError(
            "nextToken is none of ours", hint="Send the one that the last page came with."
        ) from None


def _limit(request: E2bHandler) -> int:
    asked = request.argument("limit") or "100"
    if not re.fullmatch(r"\d{1,6}", asked) or int(asked) == 0:
        raise InvalidRequestError("limit must be a number above 0", hint=f"At most {PAGE_MAX}.")
    return min(int(asked), PAGE_MAX)


def _time(text: str) -> float:
    try:
        return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        raise InvalidRequestError(
            "startedAfter must be a time of RFC 3339", hint="As in 2030-01-31T12:00:00Z."
        ) from None


def _now() -> float:
    return datetime.datetime.now(datetime.UTC).timestamp()


ONE: Final = r"/sandboxes/(?P<sandbox>[^/]+)"

VERBS: Final[Sequence[Verb]] = (
    Verb("control", "POST", r"(/v2)?/sandboxes", create),
    Verb("control", "GET", r"(/v2)?/sandboxes", list_them),
    Verb("control", "POST", rf"(/v2)?{ONE}/connect", connect),
    Verb("control", "GET", ONE, info_of),
    Verb("control", "DELETE", ONE, kill),
    Verb("control", "POST", rf"{ONE}/timeout", set_timeout),
    Verb("control", "POST", rf"{ONE}/refreshes", refresh),
    Verb("control", "POST", rf"{ONE}/pause", pause),
    Verb("control", "POST", rf"{ONE}/resume", resume),
    Verb("control", "POST", rf"{ONE}/fork", fork),
    Verb("control", "POST", rf"{ONE}/snapshots", snapshot),
    Verb("control", "GET", r"/snapshots", snapshots),
    Verb("control", "PUT", rf"{ONE}/network", network),
    Verb("control", "DELETE", r"/templates/(?!tags$)(?P<template>[^/]+)", delete_snapshot),
    Verb(
        "control", "GET|POST|PATCH|DELETE|PUT", r"(/v\d)?/(default-)?(?P<noun>templates|volumes|secrets)(/.*)?", unbuilt
    ),
)
