"""`warmcell token`: who may use this user's sandboxes from elsewhere: make, list and revoke tokens."""

import argparse
import re
import time
from typing import Any
from urllib.parse import quote

from warmcell.extension.cli.link import running_keeper
from warmcell.extension.cli.output import Verbs, duration, print_json, print_table
from warmcell.extension.cli.progress import size
from warmcell.kernel_provisioner.wishes import parse_size
from warmcell.sandbox.errors import InvalidRequestError

HEADINGS = ("TOKEN", "PRINCIPAL", "SCOPES", "AGE", "EXPIRES IN")
QUOTA_HEADINGS = ("PRINCIPAL", "SANDBOXES", "CPUS", "MEMORY", "GPU SECONDS", "SNAPSHOTS")
SCOPES = ("read", "run", "snapshot", "gpu")
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the commands."""
    verbs = Verbs(commands, "token", about="let agents and programs use your sandboxes with a token")

    create = verbs.add(
        "create",
        run_create,
        about="make a token",
        description="Make a token for a principal, which is whoever is to have sandboxes of their own here, and print "
        "it. It is shown this once. It is good for Warmcell's own paths of a server, never for Jupyter's. Quotas are "
        "the principal's, whatever token it uses; those that are given replace all that it had.",
    )
    create.add_argument("principal", metavar="PRINCIPAL", help="name of whoever gets it")
    create.add_argument(
        "--scope",
        action="append",
        choices=SCOPES,
        help="what it is good for; may be given several times (default: all of them)",
    )
    create.add_argument("--expires", metavar="TIME", help='for how long, such as "12h" or "30d" (default: for good)')
    create.add_argument("--sandboxes", type=int, metavar="N", help="most sandboxes at a time")
    create.add_argument("--cpus", type=float, metavar="N", help="most CPU cores of all of them together")
    create.add_argument("--memory", metavar="SIZE", help='most memory of all of them together, such as "16GiB"')
    create.add_argument("--gpu-seconds", type=float, metavar="N", help="most GPU time altogether")
    create.add_argument("--snapshots", metavar="SIZE", help='disk space at which it takes no more snapshots: "50GiB"')

    verbs.add(
        "ls",
        run_ls,
        about="list tokens",
        description="List the tokens that were not revoked, and what each principal has of what it may have.",
    )

    revoke = verbs.add(
        "revoke",
        run_revoke,
        about="have tokens be of no use any more",
        description="Revoke tokens, or with --everything remove principals: their tokens, sandboxes and snapshots.",
    )
    revoke.add_argument("which", nargs="+", metavar="TOKEN", help="id, as `warmcell token ls` shows it")
    revoke.add_argument(
        "--everything", action="store_true", help="TOKEN is a principal's name; remove all that it has, and its quota"
    )


def run_create(arguments: argparse.Namespace) -> int:
    """Print the new token."""
    body: dict[str, Any] = {"principal": arguments.principal}
    if arguments.scope:
        body["scopes"] = arguments.scope
    if arguments.expires is not None:
        body["expires_in_s"] = seconds(arguments.expires)
    quota = {
        "sandboxes": arguments.sandboxes,
        "cpus": arguments.cpus,
        "memory_bytes": None if arguments.memory is None else parse_size(arguments.memory),
        "gpu_seconds": arguments.gpu_seconds,
        "snapshot_bytes": None if arguments.snapshots is None else parse_size(arguments.snapshots),
    }
    if any(cap is not None for cap in quota.values()):
        body["quota"] = quota
    keeper = running_keeper(start=True)
    assert keeper is not None
    with keeper:
        made = keeper.post("/tokens", body)
    if arguments.json:
        print_json(made)
    else:
        print(made["token"])
    return 0


def run_ls(arguments: argparse.Namespace) -> int:
    """Print tokens and quotas."""
    keeper = running_keeper(start=True)
    assert keeper is not None
    with keeper:
        tokens = keeper.get("/tokens")["tokens"]
        principals = keeper.get("/principals")["principals"]
    if arguments.json:
        print_json({"tokens": tokens, "principals": principals})
        return 0
    if not principals:
        print("No tokens. `warmcell token create NAME` makes one.")
        return 0
    now = time.time()
    print_table(HEADINGS, [_token_row(one, now) for one in tokens])
    print()
    print_table(QUOTA_HEADINGS, [_quota_row(one) for one in principals])
    return 0


def run_revoke(arguments: argparse.Namespace) -> int:
    """Say what has gone."""
    keeper = running_keeper(start=True)
    assert keeper is not None
    gone: list[dict[str, Any]] = []
    with keeper:
        for which in arguments.which:
            if arguments.everything:
                gone.append({"principal": which, **keeper.delete(f"/principals/{quote(which, safe='')}", timeout=None)})
            else:
                keeper.delete(f"/tokens/{quote(which, safe='')}")
                gone.append({"tokens": [which]})
    if arguments.json:
        print_json({"removed": gone})
        return 0
    for one in gone:
        if arguments.everything:
            counts = ", ".join(f"{len(one[noun])} {noun}" for noun in ("tokens", "sandboxes", "snapshots"))
            print(f"Removed {one['principal']}: {counts}.")
        else:
            print(f"Revoked {one['tokens'][0]}.")
    return 0


def seconds(text: str) -> float:
    """Seconds of "90s", "12h", "30d".

    Raises:
        InvalidRequestError: It is no span of time.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", text.strip())
    if match is None:
        raise InvalidRequestError(f"{text!r} is no span of time", hint='Write it as "90s", "30m", "12h" or "30d".')
    return float(match[1]) * UNITS_S[match[2]]


def _token_row(token: dict[str, Any], now: float) -> tuple[str, ...]:
    ends = token["expires_at"]
    left = "never" if ends is None else duration(ends - now) if ends > now else "expired"
    return token["id"], token["principal"], " ".join(token["scopes"]), duration(now - token["created_at"]), left


def _quota_row(principal: dict[str, Any]) -> tuple[str, ...]:
    used, quota = principal["used"], principal["quota"]

    def cell(name: str, show: Any = lambda value: f"{value:g}") -> str:
        return show(used[name]) if quota[name] is None else f"{show(used[name])} of {show(quota[name])}"

    return (
        principal["name"],
        cell("sandboxes"),
        cell("cpus"),
        cell("memory_bytes", size),
        cell("gpu_seconds"),
        cell("snapshot_bytes", size),
    )
