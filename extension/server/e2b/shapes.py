"""E2B's sandboxes and ours: what a request for one asks for, and how ours are shown. Pure."""

import datetime
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from warmcell.extension.server.e2b.fields import Fields
from warmcell.extension.server.e2b.keys import Keys
from warmcell.sandbox.errors import InvalidRequestError, UnsupportedOperationError

ENVD_VERSION: Final = "0.6.4"
"""By it clients choose what to ask for."""

CLIENT_ID: Final = "warmcell"
USUAL_TEMPLATES: Final = ("base", "code-interpreter-v1", "code-interpreter", "mcp-gateway")
SANDBOX_VARIABLE: Final = "E2B_SANDBOX"
"""Code sees by it where it runs, and kernels show the data of tables and charts, too."""

USER: Final = "user"
"""What clients call the one user that a sandbox has; programs look for its home in /home/user."""

GPU_METADATA: Final = "gpu"
TEMPLATE_TAG: Final = "e2b.template"
PUBLIC_TAG: Final = "e2b.public"
"""Whether everybody who has the address may use the sandbox's ports, where the operator lets sandboxes do that."""

GATEWAY_TAG: Final = "e2b.gateway"
"""Which token opens the sandbox's MCP gateway, as `Keys.gateway` has it."""

TIMEOUT_S: Final = 300
TIMEOUT_MAX_S: Final = 10 * 365 * 86400
ALL_TRAFFIC: Final = ("0.0.0.0/0", "::/0")
OWN_PORTS: Final = (49983, 49999)
"""Of envd and the code interpreter; nothing of the sandbox's listens there."""

LEVELS: Final = ("debug", "info", "warn", "error")
LOGS_MAX: Final = 1000
"""Entries of a log in one answer."""

MIB: Final = 2**20
NEVER_S: Final = TIMEOUT_MAX_S
"""A time has to be named for the end of a sandbox that has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSandbox:
    """What a request for a sandbox asks for."""

    template: str
    name: str
    """The template without its GPU."""
    gpu: str | None
    env: Mapping[str, str]
    network: Mapping[str, Any] | None
    """What it reaches, in our words. None: nothing."""
    terms: Mapping[str, Any]

    @property
    def usual(self) -> bool:
        """Whether its template is simply a Python to run code in."""
        return self.name in USUAL_TEMPLATES


def new_sandbox(body: Fields, *, internet: bool = False, public: bool = False) -> NewSandbox:
    """Read a request.

    Args:
        body: Of the request.
        internet: Whether sandboxes reach everything that may be reached where nothing else is said.
        public: Whether a sandbox's ports may be opened to everybody.

    Raises:
        InvalidRequestError: It is not of E2B's form, or asks for more than the operator allows.
        UnsupportedOperationError: It asks for something that is not there; nothing was made.
    """
    template = body.text("templateID", most=256)
    if not template:
        raise InvalidRequestError("templateID is missing", hint="Name a template, such as base.")
    _refuse_unsupported(body)
    body.message("mcp")  # What is in it the client gives to the gateway, when that is started.
    metadata = body.mapping("metadata")
    if any(key.startswith("e2b.") for key in metadata):
        raise InvalidRequestError("metadata may not begin with e2b.", hint="Take another key.")
    name, _, gpu = template.partition(":")
    network = body.message("network") or Fields({})
    opened = network.flag("allowPublicTraffic") is True
    if opened and not public:
        raise InvalidRequestError(
            "Ports of sandboxes are not for everybody here",
            hint="Leave allow_public_traffic out and send E2b-Traffic-Access-Token, or ask whoever runs the server "
            "for c.Warmcell.e2b_public_ports.",
        )
    resume = body.message("autoResume")
    return NewSandbox(
        template=template,
        name=name,
        gpu=metadata.get(GPU_METADATA) or gpu or None,
        env={SANDBOX_VARIABLE: "true", **body.mapping("envVars")},
        network=policy(body, network, internet=internet),
        terms={
            "timeout_s": timeout_of(body) or TIMEOUT_S,
            "on_timeout": "suspend" if body.flag("autoPause") else "kill",
            "keeps_memory": body.flag("autoPauseMemory") is not False,
            "auto_resume": bool(resume is not None and resume.flag("enabled")),
            "tags": {**metadata, TEMPLATE_TAG: template, **({PUBLIC_TAG: "true"} if opened else {})},
            **_of_ports(network),
        },
    )


def timeout_of(body: Fields, name: str = "timeout") -> int | None:
    """The seconds that it shall run; None where nothing is said."""
    return body.whole(name, most=TIMEOUT_MAX_S)


def _refuse_unsupported(body: Fields) -> None:
    iam = body.message("iam")
    asked = {"iam": iam is not None and iam.given("tokens"), "volumeMounts": True}
    for name, (what, instead) in _UNBUILT.items():
        if asked[name] and body.given(name):
            raise UnsupportedOperationError(f"{name} is not supported: {what}", hint=instead)


_UNBUILT: Final[Mapping[str, tuple[str, str]]] = {
    "iam": ("there is nobody to issue identity tokens of workloads", "Add secrets to requests by network.rules."),
    "volumeMounts": ("there are no volumes", "Write files into the sandbox; snapshots keep them."),
}


def policy(body: Fields, rules: Fields, *, internet: bool) -> dict[str, Any] | None:
    """What a sandbox reaches, in our words; None: nothing.

    Args:
        body: Has `allow_internet_access`.
        rules: Has `allowOut`, `denyOut`, `rules`, `dnsServers`, `egressProxy`.
        internet: As of `new_sandbox`.

    Raises:
        InvalidRequestError: It is not of E2B's form.
        UnsupportedOperationError: It asks for what is not there.
    """
    allowed, denied = list(rules.texts("allowOut")), list(rules.texts("denyOut"))
    closed = body.flag("allow_internet_access") is False or any(one in ALL_TRAFFIC for one in denied)
    denied = [one for one in denied if one not in ALL_TRAFFIC]
    if internet and not closed:
        allowed.append("*")
    headers = _headers(rules)
    for host in headers:
        if host not in allowed and "*" not in allowed:
            raise InvalidRequestError(f"{host} has rules and is not allowed", hint="Name it in network.allowOut, too.")
    allowed = ["*" if one in ALL_TRAFFIC else one for one in allowed]
    ways = {"name_servers": list(rules.texts("dnsServers")), "through": _proxy(rules.message("egressProxy"))}
    return {"allow": allowed, "deny": denied, "headers": headers, **ways} if allowed else None


def _proxy(asked: Fields | None) -> dict[str, Any] | None:
    """A SOCKS5 proxy, in our words."""
    if asked is None:
        return None
    tls = asked.message("tls") or Fields({})
    return {
        "address": asked.text("address", most=300),
        "username": asked.text("username"),
        "password": asked.text("password") or None,
        "tls": bool(tls.flag("enabled")),
        "server_name": tls.text("serverName"),
        "certificates": tls.text("caCert"),
    }


def _of_ports(rules: Fields) -> dict[str, Any]:
    """What is asked for of the ways to a sandbox's own ports, as terms.

    Raises:
        InvalidRequestError: It is not of E2B's form.
    """
    host, ports = rules.text("maskRequestHost", most=253), rules.numbers("httpsPorts", most=65535)
    if any(port in OWN_PORTS for port in ports):
        raise InvalidRequestError(
            "network.httpsPorts has a port of E2B's own", hint=f"Leave out {' and '.join(map(str, OWN_PORTS))}."
        )
    return {**({"port_host": host} if host else {}), **({"tls_ports": ports} if ports else {})}


def _headers(rules: Fields) -> dict[str, dict[str, str]]:
    """Host to what its requests get added."""
    found: dict[str, dict[str, str]] = {}
    for host, ones in rules.lists("rules").items():
        for one in ones:
            transform = one.message("transform")
            if transform is not None:
                added = transform.mapping("headers")
                if any("${e2b." in value for value in added.values()):
                    raise UnsupportedOperationError("Identity tokens in headers are not supported", hint="Give values.")
                found.setdefault(host, {}).update(added)
    return {host: headers for host, headers in found.items() if headers}


def shown_policy(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a sandbox reaches, in E2B's words."""
    egress, terms = info["egress"] or {"allow": [], "deny": []}, info["terms"]
    everything = "*" in egress["allow"]
    return {
        "allowInternetAccess": everything,
        "network": {
            "allowOut": [] if everything else list(egress["allow"]),
            "denyOut": [*([] if everything else ALL_TRAFFIC[:1]), *egress["deny"]],
            "allowPublicTraffic": is_public(info),
            **({"dnsServers": list(egress["name_servers"])} if egress.get("name_servers") else {}),
            **({"egressProxy": _shown_proxy(egress["through"])} if egress.get("through") else {}),
            **({"maskRequestHost": terms["port_host"]} if terms["port_host"] else {}),
            **({"httpsPorts": list(terms["tls_ports"])} if terms["tls_ports"] else {}),
        },
    }


def is_public(info: Mapping[str, Any]) -> bool:
    """Whether it was asked for with ports that are for everybody."""
    return bool((info.get("terms") or {"tags": {}})["tags"].get(PUBLIC_TAG) == "true")


def _shown_proxy(through: Mapping[str, Any]) -> dict[str, Any]:
    """Without its password and certificates, as with E2B."""
    tls = {"enabled": True, **({"serverName": through["server_name"]} if through["server_name"] else {})}
    return {
        "address": through["address"],
        **({"username": through["username"]} if through["username"] else {}),
        **({"tls": tls} if through["tls"] else {}),
    }


def sandbox(info: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """As it is answered to whoever has made it or connects to it."""
    return {
        "templateID": template_of(info),
        "sandboxID": info["id"],
        "clientID": CLIENT_ID,
        "envdVersion": ENVD_VERSION,
        "envdAccessToken": keys.token(info["id"], info["principal"]),
        "trafficAccessToken": keys.token(info["id"], info["principal"], "traffic"),
        "domain": None,
    }


def listed(info: Mapping[str, Any]) -> dict[str, Any]:
    """As it is shown in a list."""
    limits = info["limits"]
    return {
        "templateID": template_of(info),
        "sandboxID": info["id"],
        "clientID": CLIENT_ID,
        "startedAt": iso(info["created_at"]),
        "endAt": iso(_ends_at(info)),
        "envdVersion": ENVD_VERSION,
        "cpuCount": cpu_count(_limit(limits, "cpu")),
        "memoryMB": round((_limit(limits, "memory") or machine_memory_bytes()) / MIB),
        "diskSizeMB": round((_limit(limits, "layer") or 0) / MIB),
        "state": state_of(info),
        "metadata": metadata_of(info),
    }


def detail(info: Mapping[str, Any], keys: Keys | None) -> dict[str, Any]:
    """As it is shown alone; with `keys` also its token."""
    terms = info["terms"]
    return {
        **listed(info),
        **({} if keys is None else {"envdAccessToken": keys.token(info["id"], info["principal"])}),
        "domain": None,
        **shown_policy(info),
        "lifecycle": {
            "autoResume": terms["auto_resume"],
            "onTimeout": "pause" if terms["on_timeout"] == "suspend" else "kill",
        },
        **({"pauseMode": "filesystem" if terms["cold"] else "full"} if state_of(info) == "paused" else {}),
    }


def is_shown(info: Mapping[str, Any]) -> bool:
    """Whether it exists for this API: somebody's by terms, and not at its end."""
    return info.get("terms") is not None and info["state"] not in ("stopping", "stopped", "failed")


def state_of(info: Mapping[str, Any]) -> str:
    """Running or paused."""
    asleep = info["state"] in ("suspended", "suspending") or info["terms"]["frozen"]
    return "paused" if asleep else "running"


def template_of(info: Mapping[str, Any]) -> str:
    """The template that it was asked for with."""
    return str(info["terms"]["tags"].get(TEMPLATE_TAG, USUAL_TEMPLATES[0]))


def metadata_of(info: Mapping[str, Any]) -> dict[str, str]:
    """What whoever made it has noted on it."""
    return {key: value for key, value in info["terms"]["tags"].items() if not key.startswith("e2b.")}


def metric(sample: Mapping[str, Any], before: Mapping[str, Any], layer_bytes: float | None) -> dict[str, Any]:
    """What it uses now; `before` is an earlier sample, since when its processors are counted."""
    elapsed = max(sample["at"] - before["at"], 1e-3)
    used = max(sample["cpu_s"] - before["cpu_s"], 0.0)
    total = int(sample["memory_limit_bytes"] or machine_memory_bytes())
    disk_used = sample.get("disk_used_bytes")
    disk_total = sample.get("disk_limit_bytes") or layer_bytes
    return {
        "timestamp": iso(sample["at"]),
        "timestampUnix": int(sample["at"]),
        "cpuCount": cpu_count(sample["cpus"]),
        "cpuUsedPct": round(100 * used / elapsed, 2),
        "memUsed": int(sample["memory_bytes"]),
        "memTotal": total,
        "memCache": int(sample["cache_bytes"]),
        "diskUsed": int(disk_used or 0),
        "diskTotal": int(disk_total or 0),
    }


def asked_of_log(
    entries: Sequence[dict[str, Any]],
    *,
    since_ms: int | None = None,
    most: int | None = None,
    direction: str = "",
    level: str = "",
    search: str = "",
) -> list[dict[str, Any]]:
    """Those of a log's entries, the oldest first, that a request asks for.

    Args:
        entries: All.
        since_ms: The Unix time in milliseconds from which on; the other way up to which.
        most: How many at most; no more than `LOGS_MAX`.
        direction: `forward`, as without it, or `backward`: the newest first.
        level: The least: `debug`, `info`, `warn` or `error`. Empty: all.
        search: What they say, or their fields.

    Raises:
        InvalidRequestError: There is no such direction or level.
    """
    if direction not in ("", "forward", "backward") or level not in ("", *LEVELS):
        raise InvalidRequestError(
            "direction or level is none", hint=f"Take forward or backward, and one of {', '.join(LEVELS)}."
        )
    backward, least = direction == "backward", LEVELS.index(level) if level else 0
    found = []
    for entry in reversed(entries) if backward else entries:
        at_ms = round(datetime.datetime.fromisoformat(entry["timestamp"]).timestamp() * 1000)
        beyond = since_ms is not None and (at_ms > since_ms if backward else at_ms < since_ms)
        said = (entry["message"], *entry["fields"].values())
        if not beyond and LEVELS.index(entry["level"]) >= least and any(search in text for text in said):
            found.append(entry)
    return found[: min(LOGS_MAX if most is None else most, LOGS_MAX)]


def log_entries(commands: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was started in a sandbox and how it ended, the oldest first."""
    entries = []
    for one in commands:
        fields = {"pid": str(one["pid"]), "cmd": " ".join(one["argv"])}
        entries.append((one["started_at"], "info", "process started", fields))
        if one["ended_at"] is not None:
            level = "info" if one["exit_code"] == 0 else "warn"
            entries.append((one["ended_at"], level, "process ended", {**fields, "exit_code": str(one["exit_code"])}))
    return [
        {"timestamp": iso(at), "level": level, "message": message, "fields": fields}
        for at, level, message, fields in sorted(entries, key=lambda entry: entry[0])
    ]


def iso(at: float) -> str:
    """A Unix time as E2B writes it."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat().replace("+00:00", "Z")


def cpu_count(limit: float | None) -> int:
    """Whole processors."""
    return max(1, round(limit)) if limit is not None else os.cpu_count() or 1


def machine_memory_bytes() -> int:
    """All of it, where a sandbox has no limit of its own."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limit(limits: Mapping[str, Any], name: str) -> float | None:
    found = limits.get(name)
    return None if found is None else found["value"]


def _ends_at(info: Mapping[str, Any]) -> float:
    terms = info["terms"]
    if terms["ends_at"] is not None:
        return float(terms["ends_at"])
    return time.time() + (NEVER_S if terms["timeout_s"] is None else 0)
