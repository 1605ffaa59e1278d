"""What a caller wants of a sandbox, in the API's words."""

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from warmcell.sandbox.client import given
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import GIB, MIB

OnTimeout = Literal["suspend", "kill"]

Network = Literal["none"] | Sequence[str] | Mapping[str, Any]
"""What a sandbox reaches: nothing; these hosts; or all of a policy: allow, deny, headers, packages, max_bytes."""

NETWORKS = ("none", "host")
"""Words that are sent as they are: why there is no "host" the keeper says, who knows for whom."""

TIMEOUT_S = 300.0
UNITS = {"": 1, "KIB": 1024, "MIB": MIB, "GIB": GIB, "TIB": 1024 * GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: object) -> int | None:
    """Bytes of "2GiB" and the like.

    Raises:
        InvalidRequestError: It is no size.
    """
    if text is None or isinstance(text, int):
        return text
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)", text.strip()) if isinstance(text, str) else None
    if found is None or found[2].upper() not in UNITS:
        raise InvalidRequestError(f"{text!r} is no size", hint='Give bytes, or as in "512MiB" or "2GiB".')
    return int(float(found[1]) * UNITS[found[2].upper()])


def policy_of(network: Network) -> str | dict[str, Any]:
    """The same in the API's words; raises InvalidRequestError."""
    if isinstance(network, str) and network in NETWORKS:
        return network
    return dict(network) if isinstance(network, Mapping) else {"allow": given.texts("network", network)}


class Wanted(TypedDict, total=False):
    """The arguments of `Sandbox`; there it says what they mean."""

    image: str | None
    python: str | None
    gpu: str | Sequence[str] | None
    memory: int | str | None
    cpus: float | None
    disk: int | str | None
    env: Mapping[str, str] | None
    network: Network | None
    preload: Sequence[str] | None
    template: str | None
    backend: str | None
    timeout: float | None
    on_timeout: OnTimeout
    auto_resume: bool
    tags: Mapping[str, str] | None
    snapshot: str | None
    key: str | None
    url: str | None
    token: str | None


@dataclass(frozen=True, slots=True)
class Asked:
    """The same in the API's words."""

    body: Mapping[str, Any]
    key: str


def asked_of(wanted: Wanted) -> Asked:
    """Raises InvalidRequestError where it makes no sense."""
    gpu, env, preload = wanted.get("gpu"), wanted.get("env"), wanted.get("preload")
    network = wanted.get("network")
    caps = {
        "memory_bytes": size(wanted.get("memory")),
        "cpus": wanted.get("cpus"),
        "layer_bytes": size(wanted.get("disk")),
    }
    limits = {name: value for name, value in caps.items() if value is not None}
    spec = {
        "image": wanted.get("image"),
        "python": wanted.get("python"),
        "gpu": gpu if gpu is None or isinstance(gpu, str) else given.texts("gpu", gpu),
        "limits": limits or None,
        "env": dict(env) if env else None,
        "network": None if network is None else policy_of(network),
        "preload": None if preload is None else given.texts("preload", preload),
        "template": wanted.get("template"),
        "backend": wanted.get("backend"),
    }
    terms = {
        "timeout_s": wanted.get("timeout", TIMEOUT_S),
        "on_timeout": wanted.get("on_timeout", "suspend"),
        "auto_resume": wanted.get("auto_resume", True),
        "tags": dict(wanted.get("tags") or {}),
    }
    body: dict[str, Any] = {"spec": {name: value for name, value in spec.items() if value is not None}, "terms": terms}
    if wanted.get("snapshot") is not None:
        body["snapshot"] = wanted["snapshot"]
    return Asked(body, wanted.get("key") or uuid.uuid4().hex)
