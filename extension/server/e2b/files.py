"""E2B's `/files`: downloads and uploads, also by signed URLs; and what else envd tells over plain HTTP."""

import base64
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Final

from tornado.iostream import StreamClosedError

from warmcell.extension.server.e2b import figures, gateway, uploads
from warmcell.extension.server.e2b.handler import E2bHandler, Verb
from warmcell.extension.server.e2b.processes import check_user
from warmcell.sandbox.errors import InvalidRequestError

PATH_MAX: Final = 4096
ENV_MAX_BYTES: Final = 2**20
METADATA: Final = "x-metadata-"


async def download(request: E2bHandler) -> None:
    """The bytes of a file."""
    path = _path(request)
    own = gateway.token_at(path)
    check_user(request, also="" if own is None else gateway.USER)
    path = own or path
    async with request.keeper.bytes(f"/sandboxes/{request.sandbox_id}/files", {"path": path}) as response:
        request.set_header("Content-Type", "application/octet-stream")
        request.set_header("Content-Disposition", "attachment")  # so that no browser shows it as a page
        if "Content-Length" in response.headers:
            request.set_header("Content-Length", response.headers["Content-Length"])
        try:
            async for piece in response.aiter_raw():
                await request.tell(piece)
        except StreamClosedError:  # the client has gone
            return
    request.finish(set_content_type="application/octet-stream")


async def upload(request: E2bHandler) -> None:
    """Write one file, or several; a file is the old or the new, never half."""
    check_user(request)
    content_type = request.request.headers.get("Content-Type", "")
    encoding = request.request.headers.get("Content-Encoding", "identity").lower()
    if content_type.partition(";")[0].strip().lower() == "multipart/form-data":
        if encoding != "identity":
            raise InvalidRequestError(f"{encoding} is not taken with forms", hint="Send application/octet-stream.")

        async def take(name: str, pieces: AsyncIterator[bytes]) -> Any:
            return await _write(request, request.argument("path") or name, pieces)

        written = await uploads.each_file(content_type, request.body_stream.in_time(), take)
    else:
        pieces = request.body_stream.in_time()
        if encoding not in ("identity", "gzip"):
            raise InvalidRequestError(f"{encoding} is not taken", hint="Send gzip, or the file as it is.")
        written = [await _write(request, _path(request), uploads.unzipped(pieces) if encoding == "gzip" else pieces)]
    request.answer(written)


async def compose(request: E2bHandler) -> None:
    """One file of parts that were uploaded before, which are gone then."""
    body = await request.body_stream.fields()
    check_user(request, body.text("username"))
    names = {"sources": list(body.texts("source_paths")), "target": body.text("destination", most=PATH_MAX)}
    at = f"/sandboxes/{request.sandbox_id}/files/compose"
    request.answer(_written(await request.keeper.ask("POST", at, names)))


async def environment(request: E2bHandler) -> None:
    """The variables that commands have."""
    asked = {"argv": ["env", "-0"]}
    said = bytearray()
    async with request.keeper.lines(
        "POST", f"/sandboxes/{request.sandbox_id}/commands", asked, params={"follow": "1"}
    ) as lines:
        async for line in lines:
            said += base64.b64decode(line.get("stdout", ""))
            if len(said) > ENV_MAX_BYTES:
                raise InvalidRequestError("The environment is too large to be shown", hint="Run env in a command.")
    pairs = [pair.partition("=") for pair in said.decode(errors="replace").split("\0") if pair]
    request.answer({name: value for name, _, value in pairs})


async def metrics(request: E2bHandler) -> None:
    """What the sandbox uses."""
    info = await request.keeper.ask("GET", f"/sandboxes/{request.sandbox_id}")
    found = await figures.metric_of(request, info)
    request.answer(
        {
            "ts": found["timestampUnix"],
            "cpu_count": found["cpuCount"],
            "cpu_used_pct": found["cpuUsedPct"],
            "mem_total": found["memTotal"],
            "mem_used": found["memUsed"],
            "mem_cache": found["memCache"],
            "disk_used": found["diskUsed"],
            "disk_total": found["diskTotal"],
        }
    )


async def _write(request: E2bHandler, path: str, pieces: AsyncIterator[bytes]) -> Mapping[str, Any]:
    _check(path)
    params = {"path": path, "parents": "1"}
    noted = metadata(request.request.headers.get_all())
    if noted:
        params["metadata"] = json.dumps(noted)
    info = await request.keeper.ask("PUT", f"/sandboxes/{request.sandbox_id}/files", params=params, content=pieces)
    return _written(info)


def metadata(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What a request notes on the files that it uploads: the first of each, in lower case."""
    found: dict[str, str] = {}
    for name, value in headers:
        key = name.lower().removeprefix(METADATA)
        if name.lower().startswith(METADATA) and key:
            found.setdefault(key, value)
    return found


def _written(info: Mapping[str, Any]) -> dict[str, Any]:
    noted = {"metadata": info["metadata"]} if info["metadata"] else {}
    return {"name": info["name"], "path": info["path"], "type": "file", **noted}


def _path(request: E2bHandler) -> str:
    path = request.argument("path") or ""
    _check(path)
    return path


def _check(path: str) -> None:
    if not path or "\0" in path or len(path) > PATH_MAX:
        raise InvalidRequestError("path is missing, or none", hint="Give the path of a file in the sandbox.")


VERBS: Final[Sequence[Verb]] = (
    Verb("envd", "GET", r"/files", download),
    Verb("envd", "POST|PUT", r"/files", upload),
    Verb("envd", "POST", r"/files/compose", compose),
    Verb("envd", "GET", r"/envs", environment),
    Verb("envd", "GET", r"/metrics", metrics),
)
