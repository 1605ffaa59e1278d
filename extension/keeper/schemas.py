"""JSON schemas of what the API takes and gives, made from the dataclasses that it reads and writes."""

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any, Final, Literal, NewType

from warmcell.sandbox.client.results import CommandInfo, FileInfo, Metrics
from warmcell.sandbox.models import ErrorInfo, GpuDevice, QueuePlace, SandboxInfo, SandboxSpec, SnapshotInfo, Terms
from warmcell.sandbox.usage import By, Usage, UsageRow
from warmcell.sandbox.wire import Secret

Schema = dict[str, Any]

TEXT: Final[Schema] = {"type": "string"}
WHOLE: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
YES_NO: Final[Schema] = {"type": "boolean"}
ANYTHING: Final[Schema] = {}
BYTES: Final[Schema] = {"type": "string", "format": "binary"}
NOTHING: Final[Schema] = {"type": "object", "additionalProperties": False}


def named(name: str) -> Schema:
    """A schema by its name among the components."""
    return {"$ref": f"#/components/schemas/{name}"}


def or_null(schema: Schema) -> Schema:
    """That, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def many(schema: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": schema}


def given(**fields: Schema) -> Schema:
    """An object of an answer: it has all of these and nothing else."""
    return {"type": "object", "properties": fields, "required": sorted(fields), "additionalProperties": False}


def asked(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """An object of a request: what is not required may be left out."""
    schema: Schema = {"type": "object", "properties": fields, "additionalProperties": False}
    return {**schema, "required": sorted(required)} if required else schema


def components() -> dict[str, Schema]:
    """All that have names."""
    found: dict[str, Schema] = {}
    for kind in (SandboxInfo, SnapshotInfo, ErrorInfo, CommandInfo, FileInfo, Metrics):
        _of_class(kind, found, whole=True)
    _of_class(SandboxSpec, found, whole=False, suffix="Wanted")
    _of_class(Terms, found, whole=False, suffix="Wanted")
    terms = found["TermsWanted"]["properties"]
    for told in ("ends_at", "frozen", "cold"):
        del terms[told]
    spec = found["SandboxSpecWanted"]["properties"]
    spec["python"] = TEXT
    policy = found["NetworkPolicyWanted"]["properties"]
    del spec["egress"], policy["authority"]
    policy["headers"] = {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": TEXT}}
    hosts = [many(TEXT), named("NetworkPolicyWanted")]
    spec["network"] = {"anyOf": [spec["network"], *hosts]}
    merge = {"type": "object", "additionalProperties": or_null(TEXT)}
    network = {"anyOf": [{"enum": ["none"]}, *hosts]}
    found["ChangesWanted"] = asked(**terms, merge_tags=merge, network=network)
    found["Gpu"] = _gpu(found)
    found["RunInfo"] = given(
        id=TEXT,
        context=TEXT,
        state={"enum": ["waiting", "running", "ended"]},
        status={"enum": ["ok", "error", "interrupted", "timeout", "failed", None]},
        error=or_null(named("ErrorInfo")),
        execution_count=or_null(WHOLE),
        started_at=NUMBER,
        ended_at=or_null(NUMBER),
        output=WHOLE,
    )
    file = found["FileInfo"]["properties"]
    found["MadeDirectory"] = given(**file, created=YES_NO)
    found["Context"] = given(id=TEXT, cwd=TEXT)
    quota = given(
        sandboxes=or_null(WHOLE),
        cpus=or_null(NUMBER),
        memory_bytes=or_null(WHOLE),
        gpu_seconds=or_null(NUMBER),
        snapshot_bytes=or_null(WHOLE),
    )
    used = given(sandboxes=WHOLE, cpus=NUMBER, memory_bytes=WHOLE, gpu_seconds=NUMBER, snapshot_bytes=WHOLE)
    place, waits = QueuePlace.__name__, {"sandbox_id": TEXT, "mine": YES_NO, "user": TEXT}
    _of_class(QueuePlace, found, whole=True)
    found["Waiting"] = given(**found[place]["properties"], **waits)
    found["Meters"] = _meters()
    found["UsageTold"] = given(
        since=NUMBER,
        by={"enum": list(typing.get_args(By))},
        total=_of_class(Usage, found, whole=True),
        rows=many(_of_class(UsageRow, found, whole=True)),
    )
    found["Principal"] = given(name=TEXT, quota=quota, used=used, scopes=many(TEXT))
    return dict(sorted(found.items()))


def _meters() -> Schema:
    """What is used now. A rate takes two readings, and not every driver tells what its device does."""
    gpu = given(
        uuid=TEXT,
        index=WHOLE,
        name=TEXT,
        simulated=YES_NO,
        memory_used_bytes=or_null(WHOLE),
        memory_total_bytes=WHOLE,
        utilization_pct=or_null(NUMBER),
    )
    sandbox = given(
        cpu=or_null(NUMBER),
        memory_bytes=WHOLE,
        memory_limit_bytes=or_null(WHOLE),
        busy=YES_NO,
        idle_s=or_null(NUMBER),
        gpu_pct=or_null(NUMBER),
        vram_bytes=or_null(WHOLE),
        vram_total_bytes=or_null(WHOLE),
    )
    machine = given(cpus=WHOLE, cpu=or_null(NUMBER), memory_bytes=WHOLE, memory_total_bytes=WHOLE, gpus=many(gpu))
    return given(at=NUMBER, sandboxes={"type": "object", "additionalProperties": sandbox}, machine=machine)


def _gpu(found: dict[str, Schema]) -> Schema:
    """A device with who has it; of what is another's, only that it is held."""
    device = _of_class(GpuDevice, dict(found), whole=True)
    assert device
    made = dict(found["GpuDevice"])
    lease = {"type": "object", "properties": {"since": NUMBER}, "required": ["since"]}
    return {
        **made,
        "properties": {**made["properties"], "lease": or_null(lease), "leases": many(lease), "lost": YES_NO},
        "required": sorted([*made["required"], "lease", "lost"]),
    }


def _of_class(kind: type[Any], found: dict[str, Schema], *, whole: bool, suffix: str = "") -> Schema:
    name = kind.__name__ + suffix
    if name not in found:
        found[name] = {}  # so that one that has itself inside ends
        hints = typing.get_type_hints(kind)
        fields = {one.name: _of(hints[one.name], found, whole=whole, suffix=suffix) for one in dataclasses.fields(kind)}
        found[name] = given(**fields) if whole else asked((), **fields)
    return named(name)


def _of(kind: Any, found: dict[str, Schema], *, whole: bool, suffix: str) -> Schema:
    """The schema of a type, as `Wire` writes and reads it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)

    def inner(one: Any) -> Schema:
        return _of(one, found, whole=whole, suffix=suffix)

    if isinstance(kind, NewType):
        return inner(kind.__supertype__)
    if dataclasses.is_dataclass(kind):
        return _of_class(typing.cast(type[Any], kind), found, whole=whole, suffix=suffix)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if one is types.NoneType else inner(one) for one in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return many(inner(arguments[0]))
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": inner(arguments[1])}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [one.value for one in kind]}
    return {str: TEXT, Secret: TEXT, bool: YES_NO, int: WHOLE, float: NUMBER}.get(kind, ANYTHING)
