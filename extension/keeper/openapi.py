"""The OpenAPI document of the REST that agents and programs use; docs/reference/openapi.json is made from it.

Each operation says which scope of a token it takes (`x-warmcell-scope`); those without are for the user alone.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from warmcell.extension.keeper.gate import ANY, PREFIX
from warmcell.extension.keeper.principals import SCOPES
from warmcell.extension.keeper.schemas import (
    BYTES,
    NOTHING,
    NUMBER,
    TEXT,
    WHOLE,
    YES_NO,
    Schema,
    asked,
    components,
    given,
    many,
    named,
    or_null,
)

JSON, RAW, LINES = "application/json", "application/octet-stream", "application/x-ndjson"
ARCHIVE, TAR, EVENTS = "application/zstd", "application/x-tar", "text/event-stream"

SANDBOX, SNAPSHOT, COMMAND, RUN = (named(name) for name in ("SandboxInfo", "SnapshotInfo", "CommandInfo", "RunInfo"))
FILE: Final = named("FileInfo")

ALL_SNAPSHOTS: Final = given(
    snapshots=many(SNAPSHOT),
    unreadable=many(given(id=TEXT, error=named("ErrorInfo"))),
    used_bytes=WHOLE,
    quota_bytes=or_null(WHOLE),
    imports=YES_NO,
)
"""What the user is told; to a principal only its own snapshots are."""

GPUS: Final = asked(("gpus",), gpus=many(named("Gpu")), queue=many(named("Waiting")), shares=WHOLE, problem=TEXT)

BOX: Final = "/sandboxes/{sandbox_id}"
PATH: Final = {"path": "Absolute, or below the home."}
WAIT: Final = {"wait": "Seconds to wait for its end at most, up to 300."}
STAYS: Final = {"wait": "Seconds to answer after, up to 300; at once (401) when the token ends meanwhile."}
FROM: Final = {"from": "Number of the first entry.", "until": "`now`: what there is at present, not what comes."}
FOLLOW: Final = {"follow": "1: answer its output instead, as lines of JSON, until it has ended.", **FROM}
WITHIN: Final = {"sandbox_id": "Those of this sandbox.", "kernel_id": "Those of this kernel."}
NEW_ID: Final = {"type": "string", "pattern": "^[a-z0-9]{1,32}$"}


@dataclass(frozen=True, slots=True)
class Operation:
    """One verb of one path."""

    summary: str
    scope: str | None
    """Of a token; any, or None: for the user alone."""
    answer: Schema | None = None
    """None: 204, without one."""
    status: int = 200
    kind: str = JSON
    """Of the answer."""
    body: Schema | None = None
    body_kind: str = JSON
    query: dict[str, str] | None = None
    follows: bool = False
    """Whether `follow=1` makes the answer 200 and lines."""
    once: bool = False
    """Whether an `Idempotency-Key` makes it safe to send again."""


def _read(summary: str, answer: Schema, **more: Any) -> Operation:
    return Operation(summary, "read", answer, **more)


def _run(summary: str, answer: Schema | None = None, **more: Any) -> Operation:
    return Operation(summary, "run", answer, **more)


def _save(summary: str, answer: Schema | None = None, **more: Any) -> Operation:
    return Operation(summary, "snapshot", answer, **more)


def _own(summary: str, answer: Schema | None = None, **more: Any) -> Operation:
    return Operation(summary, None, answer, **more)


OPERATIONS: Final[dict[str, dict[str, Operation]]] = {
    "/openapi.json": {"get": _read("This document.", {"type": "object"})},
    "/gpus": {"get": _read("The machine's GPUs; to the user also who waits for one.", GPUS)},
    "/meters": {"get": _own("What the machine and each sandbox use now.", named("Meters"))},
    "/usage": {
        "get": _own(
            "What was used: GPU, processor and memory seconds, active and idle.",
            named("UsageTold"),
            query={"by": "`owner`, `notebook` or `sandbox`.", "days": "Of so many days; 0: of all."},
        )
    },
    "/check": {
        "post": _read(
            "Whether a sandbox of that spec would start. Makes nothing.",
            given(spec={"type": "object"}),
            body=asked(spec=named("SandboxSpecWanted")),
        )
    },
    "/events": {"get": _read("Changes of sandboxes as they come, the present first.", TEXT, kind=EVENTS)},
    "/principals/self": {
        "get": Operation(
            "Whose token this is, what it may have and what it has.", ANY, named("Principal"), query=STAYS
        ),
        "delete": _run(
            "End all of its sandboxes and remove its snapshots.",
            given(sandboxes=many(TEXT), snapshots=many(TEXT), tokens=many(TEXT)),
        ),
    },
    "/sandboxes": {
        "get": _read(
            "Sandboxes, the oldest first.",
            given(sandboxes=many(SANDBOX), next=or_null(TEXT)),
            query={
                "tag": "key=value; several must all hold.",
                "state": "One or more of SandboxInfo's, separated by commas.",
                "owner": "As in SandboxInfo.",
                "limit": "Most of them.",
                "after": "`next` of the page before.",
            },
        ),
        "post": _run(
            "Make one. With terms it outlives whoever asks, and its kernel answers; with a token it always has terms.",
            SANDBOX,
            status=201,
            body=asked(spec=named("SandboxSpecWanted"), terms=named("TermsWanted"), snapshot=TEXT, kernel=YES_NO),
            once=True,
        ),
    },
    BOX: {
        "get": _read("One of them.", SANDBOX),
        "patch": _run(
            "Change its terms (its time begins anew with timeout_s), or what it reaches.",
            SANDBOX,
            body=named("ChangesWanted"),
        ),
        "delete": _run("End it with all that is in it. Idempotent."),
    },
    f"{BOX}/connect": {
        "post": _run(
            "Wake it if it sleeps; its time begins anew.", SANDBOX, body=asked(timeout_s=or_null(NUMBER), memory=YES_NO)
        )
    },
    f"{BOX}/queue": {"delete": _run("Give up waiting for a GPU: its start, or its cell, fails.")},
    f"{BOX}/metrics": {
        "get": _run("What it uses now.", named("Metrics"), query={"disk": "1: also how much it has written."})
    },
    f"{BOX}/interrupt": {"post": _run("Interrupt what runs in its kernel.", NOTHING)},
    f"{BOX}/suspend": {
        "post": _run("Memory and files to disk, processes gone.", SANDBOX, body=asked(busy=YES_NO, memory=YES_NO))
    },
    f"{BOX}/resume": {"post": _run("Have it go on.", SANDBOX, body=asked(populate=YES_NO))},
    f"{BOX}/park": {"post": _run("Give its GPUs back; its kernel lives on until its next cell.", SANDBOX)},
    f"{BOX}/wake": {
        "post": _run(
            "A cell is likely to come: it takes a GPU again if one is free; else it stays as it is.",
            SANDBOX,
            body=asked(returned=YES_NO),
        )
    },
    f"{BOX}/gpu": {
        "post": _run(
            "Other GPUs for its kernel, which keeps its variables. null: none.",
            SANDBOX,
            body=asked(("gpu",), gpu={"anyOf": [TEXT, many(TEXT), {"type": "null"}]}),
        )
    },
    f"{BOX}/snapshot": {
        "post": _save(
            "Save its memory and files; it goes on. Without memory, what is made from it begins with its files alone.",
            SNAPSHOT,
            status=201,
            body=asked(name=TEXT, memory=YES_NO),
            once=True,
        )
    },
    f"{BOX}/restore": {
        "post": _save(
            "Put it back to one of its snapshots.",
            SANDBOX,
            body=asked(("snapshot",), snapshot=TEXT, populate=YES_NO),
            once=True,
        )
    },
    f"{BOX}/fork": {
        "post": _save(
            "Clones with its memory and files; it goes on.",
            given(sandboxes=many(SANDBOX)),
            status=201,
            body=asked(n={"type": "integer", "minimum": 1, "maximum": 64}),
            once=True,
        )
    },
    f"{BOX}/run": {
        "post": _run(
            "One cell in the kernel of a sandbox without terms, for `%%remote`: a line of JSON, then pickled values.",
            TEXT,
            kind=LINES,
            body=BYTES,
            body_kind=RAW,
        )
    },
    f"{BOX}/commands": {
        "get": _run("Processes that run, and the last 64 that have ended.", given(commands=many(COMMAND))),
        "post": _run(
            "Start one. The same id and body again is the same one.",
            COMMAND,
            status=201,
            query=FOLLOW,
            follows=True,
            body=asked(
                ("argv",),
                id=NEW_ID,
                argv=many(TEXT),
                cwd=TEXT,
                env={"type": "object", "additionalProperties": TEXT},
                stdin=YES_NO,
                input={"type": "string", "contentEncoding": "base64"},
                pty=or_null(asked(("rows", "columns"), rows=WHOLE, columns=WHOLE)),
                timeout_s=or_null(NUMBER),
                tag=TEXT,
            ),
        ),
    },
    f"{BOX}/commands/{{command_id}}": {
        "get": _run("One of them.", COMMAND, query=WAIT),
        "delete": _run("Kill it. Idempotent."),
    },
    f"{BOX}/commands/{{command_id}}/output": {
        "get": _run("What it has said, and says: an entry a line, in base64.", TEXT, kind=LINES, query=FROM)
    },
    f"{BOX}/commands/{{command_id}}/stdin": {
        "post": _run(
            "Input.",
            given(received=WHOLE),
            body=BYTES,
            body_kind=RAW,
            query={"close": "1: this is all."},
            once=True,
        )
    },
    f"{BOX}/commands/{{command_id}}/signal": {
        "post": _run("A signal to its process group.", NOTHING, body=asked(("signum",), signum=WHOLE))
    },
    f"{BOX}/commands/{{command_id}}/resize": {
        "post": _run(
            "Another size of its terminal.", NOTHING, body=asked(("rows", "columns"), rows=WHOLE, columns=WHOLE)
        )
    },
    f"{BOX}/runs": {
        "get": _run("Code that runs, and the last 64 that have ended.", given(runs=many(RUN))),
        "post": _run(
            "Run code in its kernel. The same id and body again is the same run.",
            RUN,
            status=201,
            query=FOLLOW,
            follows=True,
            body=asked(
                ("code",),
                id=NEW_ID,
                code=TEXT,
                context=TEXT,
                timeout_s=or_null(NUMBER),
                linger_s=or_null(NUMBER),
                env={"type": "object", "additionalProperties": TEXT},
                env_stays=YES_NO,
            ),
        ),
    },
    f"{BOX}/runs/{{run_id}}": {
        "get": _run("One of them.", RUN, query=WAIT),
        "delete": _run("Interrupt it. Idempotent."),
    },
    f"{BOX}/runs/{{run_id}}/output": {
        "get": _run("What it has shown, and shows: a message of Jupyter's a line.", TEXT, kind=LINES, query=FROM)
    },
    f"{BOX}/contexts": {
        "get": _run("Its contexts: the kernel itself, and processes below it.", given(contexts=many(named("Context")))),
        "post": _run("Another one, a process of its own.", named("Context"), status=201, body=asked(id=TEXT, cwd=TEXT)),
    },
    f"{BOX}/contexts/{{context_id}}": {"delete": _run("End it, with its variables and what runs there.")},
    f"{BOX}/contexts/{{context_id}}/restart": {"post": _run("Have it begin anew.", named("Context"))},
    f"{BOX}/files": {
        "get": _run("A file's content.", BYTES, kind=RAW, query=PATH),
        "put": _run(
            "Write a file: the old one or the new, never half.",
            FILE,
            body=BYTES,
            body_kind=RAW,
            query={
                **PATH,
                "mode": "Decimal.",
                "parents": "1: make directories.",
                "metadata": "A JSON object of texts.",
            },
        ),
        "delete": _run("Remove it.", query={**PATH, "recursive": "1: with all that is in it."}),
    },
    f"{BOX}/files/stat": {"get": _run("What a file is.", FILE, query={**PATH, "follow": "1: through links."})},
    f"{BOX}/files/list": {
        "get": _run(
            "Files of a directory, a page at a time.",
            given(files=many(FILE), next=or_null(TEXT)),
            query={**PATH, "depth": "1 to 100.", "limit": "10000 at most.", "after": "`next` of the page before."},
        )
    },
    f"{BOX}/files/url": {
        "post": _run(
            "A URL of one file, or with `tree` of a directory as a tar, without a token. `path` goes after a server's.",
            given(method=TEXT, path=TEXT, expires_at=NUMBER),
            body=asked(
                ("path",), path=TEXT, operation={"enum": ["read", "write"]}, tree=YES_NO, expires_in_s=or_null(NUMBER)
            ),
        )
    },
    f"{BOX}/ports/{{port}}": {
        "post": _run(
            "A URL, without a token, of what listens on a port of its loopback interface. `path` goes after a server's "
            "URL, or after `host` where there is one.",
            given(path=TEXT, host=or_null(TEXT), expires_at=NUMBER),
            body=asked(expires_in_s=or_null(NUMBER)),
        )
    },
    f"{BOX}/ports/{{port}}/tunnel": {
        "get": _run("A connection to that port, with `Upgrade: warmcell-port`; of the keeper alone.", status=101)
    },
    f"{BOX}/files/mkdir": {
        "post": _run("Make a directory.", named("MadeDirectory"), body=asked(("path",), path=TEXT, parents=YES_NO))
    },
    f"{BOX}/files/move": {
        "post": _run("Another name for a file.", FILE, body=asked(("source", "target"), source=TEXT, target=TEXT))
    },
    f"{BOX}/files/compose": {
        "post": _run(
            "One file of several, which are gone then.",
            FILE,
            body=asked(("sources", "target"), sources=many(TEXT), target=TEXT),
        )
    },
    f"{BOX}/files/tree": {
        "get": _run("A directory with all that is in it.", BYTES, kind=TAR, query=PATH),
        "put": _run("Unpack one.", given(files=WHOLE), body=BYTES, body_kind=TAR, query=PATH),
    },
    "/snapshots": {
        "get": _read(
            "Snapshots, the newest first.", {"anyOf": [given(snapshots=many(SNAPSHOT)), ALL_SNAPSHOTS]}, query=WITHIN
        ),
    },
    "/snapshots/{snapshot}": {
        "get": _read("One of them, by id or name.", SNAPSHOT, query=WITHIN),
        "patch": _save("Another name; empty takes it away.", SNAPSHOT, body=asked(("name",), name=TEXT), query=WITHIN),
        "delete": _save("Remove it.", query={**WITHIN, "force": "1: even if it is all there is of a suspended one."}),
    },
    "/snapshots/{snapshot}/verify": {
        "post": Operation("Compare it with its checksums.", None, given(id=TEXT, complete=YES_NO), query=WITHIN)
    },
    "/snapshots/{snapshot}/compress": {
        "post": Operation(
            "Make it smaller, until it is used again: how far it is as lines of JSON, and it at the end.",
            None,
            TEXT,
            kind=LINES,
            query=WITHIN,
        )
    },
    "/snapshots/{snapshot}/export": {
        "get": Operation("It as one file.", None, BYTES, kind=ARCHIVE, query={**WITHIN, "files_only": "1: no memory."})
    },
    "/snapshots/import": {
        "post": Operation(
            "Such a file becomes a snapshot.",
            None,
            SNAPSHOT,
            status=201,
            body=BYTES,
            body_kind=ARCHIVE,
            query={"name": "Another name."},
        )
    },
}


def document() -> dict[str, Any]:
    """All of it."""
    from warmcell import __version__

    token = {"type": "http", "scheme": "bearer", "description": "`warmcell token create`; scopes: " + ", ".join(SCOPES)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Warmcell", "version": str(__version__), "license": {"name": "BSD-3-Clause"}},
        "servers": [{"url": PREFIX}],
        "security": [{"token": []}],
        "paths": {
            path: {verb: _described(path, verb, one) for verb, one in verbs.items()}
            for path, verbs in OPERATIONS.items()
        },
        "components": {"securitySchemes": {"token": token}, "schemas": components()},
    }


def _described(path: str, verb: str, one: Operation) -> dict[str, Any]:
    """An operation in the document's words."""
    answers: dict[str, Any] = {"default": _content("What is wrong, and its cure.", JSON, named("ErrorInfo"))}
    if one.answer is None and one.status == 101:
        answers["101"] = {"description": "From here on bytes, either way."}
    elif one.answer is None:
        answers["204"] = {"description": "It is done."}
    else:
        answers[str(one.status)] = _content(one.summary, one.kind, one.answer)
    if one.follows:
        answers["200"] = _content("Its output, with `follow=1`.", LINES, TEXT)
    words = re.sub(r"[^a-z]+", "_", f"{verb}{path.replace('/{sandbox_id}/', '/').replace('openapi.json', 'document')}")
    told: dict[str, Any] = {"operationId": words.strip("_"), "summary": one.summary, "responses": answers}
    if one.scope is not None:
        told["x-warmcell-scope"] = one.scope
    parameters = list(_parameters(path, one))
    if parameters:
        told["parameters"] = parameters
    if one.body is not None:
        told["requestBody"] = {"content": {one.body_kind: {"schema": one.body}}}
    return told


def _parameters(path: str, one: Operation) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", path):
        yield {"name": name, "in": "path", "required": True, "schema": TEXT}
    for name, description in (one.query or {}).items():
        yield {"name": name, "in": "query", "description": description, "schema": TEXT}
    if one.once:
        once = "The same key and request again gets the first one's answer, for ten minutes."
        yield {"name": "Idempotency-Key", "in": "header", "description": once, "schema": TEXT}


def _content(description: str, kind: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": schema}}}
