"""`warmcell kernelspec`: kernels of other Python environments, as Jupyter's launcher shows them."""

import argparse
import sys
from typing import Any, get_args

from warmcell.extension.cli.output import WARNING, Verbs, print_cure, print_json, print_table
from warmcell.sandbox.models import DEFAULT_PRELOAD, HomeMode, Network, WorkspaceMode


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command and its three verbs."""
    verbs = Verbs(
        commands,
        "kernelspec",
        about="install, list and remove kernels of other Python environments",
        description="Jupyter starts a kernel from a kernelspec. Each Python environment whose kernels should run in "
        "sandboxes gets one of its own.",
    )
    _add_install(verbs)
    verbs.add(
        "list",
        run_list,
        about="list Warmcell kernelspecs",
        description="List Warmcell kernelspecs and their environments.",
    )
    removal = verbs.add(
        "remove",
        run_remove,
        about="remove a Warmcell kernelspec",
        description="Remove a Warmcell kernelspec; no other is touched.",
    )
    removal.add_argument("name", metavar="NAME", help="its name, as `warmcell kernelspec list` shows it")


def _add_install(verbs: Verbs) -> None:
    parser = verbs.add(
        "install",
        run_install,
        about="make a kernelspec for a Python environment",
        description="Make a kernelspec whose kernels run in sandboxes with the given Python environment, which needs "
        "`ipykernel` and nothing of ours. What is set here is what a notebook starts with; it may ask for something "
        "else within the operator's bounds.",
    )
    basis = parser.add_mutually_exclusive_group()
    basis.add_argument("--python", metavar="PATH", help="its interpreter (default: the one that runs this)")
    basis.add_argument("--image", metavar="NAME", help="an image instead of an environment of this machine's")
    parser.add_argument("--name", help="name of the kernelspec (default: made from the environment's folder)")
    parser.add_argument("--display-name", metavar="TEXT", help="what the launcher shows")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--user", action="store_true", help="for this user alone (the default)")
    place.add_argument("--prefix", metavar="DIR", help="for all users of an environment, such as /usr/local")
    parser.add_argument(
        "--preload",
        metavar="MODULES",
        type=_modules,
        help="modules imported in advance, separated by commas; `none` for no template "
        f"(default: what is installed of {', '.join(DEFAULT_PRELOAD)})",
    )
    parser.add_argument("--template", metavar="NAME", help="name of the template that the preload list makes")
    parser.add_argument(
        "--warmup",
        metavar="CODE",
        help="a line of Python, or module:function, that is run once in the template after its imports",
    )
    parser.add_argument("--network", choices=get_args(Network), help="network of its kernels (default: none)")
    parser.add_argument("--workspace", choices=get_args(WorkspaceMode), help="the notebook's folder (default: rw)")
    parser.add_argument("--home", choices=get_args(HomeMode), help="home directory (default: private)")
    parser.add_argument("--gpu", metavar="REQUEST", help='GPUs, such as "A100" or "any:2" (default: CPU)')
    parser.add_argument("--memory", metavar="SIZE", help='memory cap, such as "8GiB" (default: none)')
    parser.add_argument("--cpus", metavar="N", type=float, help="CPU cores, such as 1.5 (default: no cap)")
    parser.add_argument(
        "--mount",
        metavar="FOLDER",
        action="append",
        help='another host folder, such as "/data" (read-only) or "/data:/mnt/data:rw"; may be given several times',
    )
    parser.add_argument(
        "--env",
        metavar="NAME",
        action="append",
        help="a variable that kernels get from the environment of whoever starts them; may be given several times",
    )


def run_install(arguments: argparse.Namespace) -> int:
    """Write a kernelspec and say where."""
    from warmcell.kernel_provisioner.kernelspecs import install

    installed = install(
        arguments.python or ("" if arguments.image else sys.executable),
        name=arguments.name,
        display_name=arguments.display_name,
        user=arguments.user,
        prefix=arguments.prefix,
        config=_config(arguments),
    )
    if arguments.json:
        print_json(installed.to_json())
    else:
        print(f"Installed kernelspec {installed.name} ({installed.display_name}) in {installed.directory}")
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    """Print the Warmcell kernelspecs; exit code 3 if one cannot start."""
    from warmcell.extension.environments import kernelspecs

    found = kernelspecs()
    if arguments.json:
        print_json({"kernelspecs": [spec.to_json() for spec in found]})
    elif not found:
        print("No Warmcell kernelspecs. `warmcell kernelspec install` makes one.")
    else:
        print_table(
            ("NAME", "SHOWN AS", "PYTHON", "IN"),
            [(spec.name, spec.display_name, spec.python, spec.directory) for spec in found],
        )
        for spec in found:
            if not spec.ok:
                print(f"{spec.name}: {spec.why}")
                print_cure(spec.hint)
    return 0 if all(spec.ok for spec in found) else WARNING


def run_remove(arguments: argparse.Namespace) -> int:
    """Remove one and say what was removed."""
    from warmcell.kernel_provisioner.kernelspecs import remove

    directory = remove(arguments.name)
    if arguments.json:
        print_json({"removed": [str(directory)]})
    else:
        print(f"Removed {directory}")
    return 0


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given of the kernelspec's configuration, in its names.

    Raises:
        InvalidRequestError: The GPU request is not in the grammar.
    """
    from warmcell.sandbox.gpus.requests import canonical

    given = {
        "image": arguments.image,
        "preload": arguments.preload,
        "template": arguments.template,
        "warmup": arguments.warmup,
        "network": arguments.network,
        "workspace": arguments.workspace,
        "home": arguments.home,
        "gpu": None if arguments.gpu is None else canonical(arguments.gpu),
        "memory": arguments.memory,
        "cpus": arguments.cpus,
        "mounts": arguments.mount,
        "env": arguments.env,
    }
    return {name: value for name, value in given.items() if value is not None}


def _modules(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [] if names == ["none"] else names
