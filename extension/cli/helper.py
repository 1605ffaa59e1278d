"""`warmcell helper`: the root process through which ordinary users have memory snapshots."""

import argparse
import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warmcell.extension.cli.output import WARNING, Verbs, print_cure, print_json
from warmcell.sandbox.helper.maker import SANDBOXES_MAX
from warmcell.sandbox.helper.system import IMAGES, SOCKET


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the commands."""
    verbs = Verbs(commands, "helper", about="run the machine's helper, through which users save kernels' memory")

    verbs.add(
        "status",
        run_status,
        about="say whether it runs, and what it can do",
        description="Ask the machine's helper what it can do for you. Exit code 0: all; 3: it does not run, or "
        "something is missing.",
    )

    verbs.add(
        "install",
        run_install,
        about="set it up as a service (root)",
        description="Copy the helper to /opt/warmcell/helper, where only root can change it, and have systemd run it. "
        "Refused from an environment that others than root can change. Without systemd it says how to run it.",
    )

    verbs.add(
        "uninstall",
        run_uninstall,
        about="stop it and remove the service (root)",
        description="Stop the helper, which ends the sandboxes that it holds, and remove what `install` made. Images "
        f"of snapshots in {IMAGES} stay.",
    )

    run = verbs.add(
        "run",
        run_here,
        about="run it here (root)",
        description="Run the helper in the foreground until it is interrupted, for machines without systemd. Its log "
        "is its stderr.",
    )
    run.add_argument("--socket", type=Path, default=Path(SOCKET), help=f"where it listens (default: {SOCKET})")
    run.add_argument("--images", type=Path, default=Path(IMAGES), help=f"where images are (default: {IMAGES})")
    run.add_argument(
        "--max-sandboxes",
        type=int,
        default=SANDBOXES_MAX,
        help=f"most sandboxes of one user (default: {SANDBOXES_MAX})",
    )


def run_status(arguments: argparse.Namespace) -> int:
    """Ask it."""
    said = asyncio.run(look())
    if arguments.json:
        print_json(said)
    elif said["running"]:
        print(f"The helper runs, with CRIU {said['criu'] or 'missing'}.")
        for what, ready, why in (
            ("Memory snapshots", said["ready"], said["why_not"]),
            ("Sandboxes for users", said["makes"], said["makes_why_not"]),
        ):
            print(f"{what}: {'yes' if ready else f'no: {why}'}")
    else:
        print(f"The helper does not run: {said['why_not']}")
    if not arguments.json:
        print_cure(said["hint"])
    return 0 if said["ready"] and said["makes"] else WARNING


async def look() -> Mapping[str, Any]:
    """What the helper says of itself, or why it does not."""
    from warmcell.sandbox.errors import WarmcellError
    from warmcell.sandbox.snapshots.criu import SystemHelper, hello

    nothing = {"criu": "", "ready": False, "makes": False, "makes_why_not": "", "kernel": ""}
    try:
        said = await hello(SystemHelper())
    except WarmcellError as error:
        return {"running": False, **nothing, "why_not": error.message, "hint": error.hint}
    kept = ("criu", "ready", "makes", "makes_why_not", "kernel", "why_not", "hint")
    return {"running": True, **{name: said[name] for name in kept}}


def run_install(arguments: argparse.Namespace) -> int:
    """Set it up, and say what was done."""
    from warmcell.extension.helper_setup import Setup

    return _tell(Setup().install(), as_json=arguments.json)


def run_uninstall(arguments: argparse.Namespace) -> int:
    """Remove it, and say what was done."""
    from warmcell.extension.helper_setup import Setup

    return _tell(Setup().uninstall(), as_json=arguments.json)


def run_here(arguments: argparse.Namespace) -> int:
    """Become it, from files that only root can change."""
    from warmcell.extension import helper_setup
    from warmcell.sandbox.backends.bubblewrap import binary
    from warmcell.sandbox.helper.start import system_command
    from warmcell.sandbox.snapshots.criu import helper_environment

    helper_setup.need_root()
    helper_setup.check_trusted(helper_setup.package())
    argv = system_command(
        str(helper_setup.trusted_python()),
        socket=str(arguments.socket.absolute()),
        images=str(arguments.images.absolute()),
        most=arguments.max_sandboxes,
        folder=helper_setup.package().parent,
    )
    env = {**helper_environment(), binary.OVERRIDE: str(binary.find().path)}
    os.execve(argv[0], argv, env)


def _tell(done: list[str], *, as_json: bool) -> int:
    if as_json:
        print_json({"done": done})
    else:
        print("\n".join(done) or "There was nothing to do.")
    return 0
