"""`warmcell images`: what sandboxes' files come from: build, list, remove."""

import argparse
import re
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

from warmcell.extension.cli.link import running_keeper
from warmcell.extension.cli.output import Verbs, duration, print_json, print_table
from warmcell.extension.cli.progress import WIDTH, size
from warmcell.sandbox.errors import ImageBuildError, InvalidRequestError, WarmcellError
from warmcell.sandbox.models import ImageInfo

if TYPE_CHECKING:
    from warmcell.sandbox.client.keeper import SyncKeeperClient
    from warmcell.sandbox.images.image import Image

HEADINGS = ("IMAGE", "NAME", "FOR", "DISK", "AGE", "LAST USED", "MADE OF")
VARIABLE = "image"
"""In a file of Python: what is built, unless another name is given."""

_STEP = re.compile(r"\[(\d+)/(\d+)\] (.*)")
_SHOWN = 60
"""Characters of a step."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the commands."""
    verbs = Verbs(commands, "images", about="build, list and remove images", description="What sandboxes run on.")
    verbs.add(
        "ls",
        run_ls,
        about="list images",
        description="List the images that were built here, the one that was used last first.",
    )
    build = verbs.add(
        "build",
        run_build,
        about="build an image",
        description="Build an image from a file that says what is in it: a requirements.txt, a pyproject.toml (its "
        "dependencies), an environment.yml, a Dockerfile, or a file of Python that declares "
        "`image = warmcell.Image...`. What is there already is not built again.",
    )
    build.add_argument("file", metavar="FILE", help="what to build; `FILE.py:NAME` for another variable than `image`")
    build.add_argument("--name", default="", help="what to call it, for kernelspecs and Image.from_name")
    build.add_argument("--backend", default="auto", help="for whose sandboxes: bubblewrap, docker (default: what fits)")
    build.add_argument("--python", metavar="VERSION", help='Python under packages, such as "3.12" (default: as this)')
    build.add_argument("--again", action="store_true", help="build it although it is there")
    build.add_argument("--verbose", "-v", action="store_true", help="print all output as it comes")
    build.add_argument("--dockerfile", action="store_true", help="print it as a Dockerfile, and build nothing")
    rm = verbs.add("rm", run_rm, about="remove images", description="Remove images that nobody uses.")
    rm.add_argument("image", nargs="+", metavar="IMAGE", help="name, digest or the beginning of one")


def run_ls(arguments: argparse.Namespace) -> int:
    """Print the list."""
    with _keeper() as keeper:
        answer = keeper.get("/images")
    if arguments.json:
        print_json(answer)
        return 0
    infos = [ImageInfo.from_json(one) for one in answer["images"]]
    if not infos:
        print("No images.")
        return 0
    print_table(HEADINGS, [_row(info) for info in infos])
    quota = answer["quota_bytes"]
    print(f"{size(answer['used_bytes'])} in use{f' of {size(quota)}' if quota is not None else ''}.")
    return 0


def _row(info: ImageInfo) -> Sequence[str]:
    now = time.time()
    return (
        _short(info),
        ", ".join(info.names) or "-",
        ", ".join(info.backends),
        size(info.size_bytes),
        duration(now - info.created_at),
        f"{duration(now - info.last_used_at)} ago",
        info.made_of,
    )


def _short(info: ImageInfo) -> str:
    return info.digest.removeprefix("sha256:")[:12]


def run_build(arguments: argparse.Namespace) -> int:
    """Build it, while one looks on."""
    from warmcell.sandbox.client.images import build_with

    image = declared(arguments.file, python=arguments.python)
    if arguments.dockerfile:
        return _print_dockerfile(image)
    with _keeper() as keeper, BuildProgress(verbose=arguments.verbose) as progress:
        try:
            info = build_with(
                keeper,
                image,
                name=arguments.name,
                backend=arguments.backend,
                again=arguments.again,
                progress=progress.line,
            )
        except ImageBuildError as error:
            if not arguments.verbose:
                progress.clear()
                print(error.details.get("output", ""), file=sys.stderr)
            raise
    if arguments.json:
        print_json(info.to_json())
    else:
        called = f" ({arguments.name})" if arguments.name else ""
        print(f"{_short(info)}{called}: {size(info.size_bytes)}, for {', '.join(info.backends)}")
    return 0


def _print_dockerfile(image: "Image") -> int:
    from warmcell.sandbox.images.dockerfile import CONDA_PYTHON, render
    from warmcell.sandbox.images.steps import CondaBase, DockerfileBase, NamedBase, PythonBase, RegistryBase

    match image.base:
        case PythonBase():
            base = f"python:{image.base.version}-slim"
        case CondaBase():
            base = f"python:{CONDA_PYTHON}-slim"
        case RegistryBase():
            base = image.base.reference
        case DockerfileBase() | NamedBase():
            raise InvalidRequestError(
                "An image that begins with another has no Dockerfile of its own", hint="Print that of the other one."
            )
    print(render(image, base=base).text, end="")
    return 0


def run_rm(arguments: argparse.Namespace) -> int:
    """Remove one after the other."""
    removed = []
    with _keeper() as keeper:
        for ref in arguments.image:
            keeper.delete(f"/images/{quote(ref, safe='')}")
            removed.append(ref)
            if not arguments.json:
                print(f"Removed {ref}")
    if arguments.json:
        print_json({"removed": removed})
    return 0


def declared(file: str, *, python: str | None) -> "Image":
    """The image that a file declares, by what kind of file it is. Runs a file of Python.

    Raises:
        InvalidRequestError: It cannot be read, or declares none.
    """
    from warmcell.sandbox.images.image import Image

    path = Path(file)
    script, _, variable = file.partition(".py:")
    if variable or path.suffix == ".py":
        if python is not None:
            raise InvalidRequestError("A file of Python says itself which Python it means", hint="Leave out --python.")
        return _declared_in_python(Path(f"{script}.py") if variable else path, variable or VARIABLE)
    if path.name.startswith("Dockerfile") or path.suffix == ".dockerfile":
        if python is not None:
            raise InvalidRequestError("A Dockerfile says itself which Python it has", hint="Leave out --python.")
        return Image.from_dockerfile(path, context_dir=path.parent)
    if path.suffix == ".toml":
        return Image.python(python).pip_install_from_pyproject(path)
    if path.suffix in (".txt", ".in"):
        return Image.python(python).pip_install_from_requirements(path)
    if path.suffix in (".yml", ".yaml"):
        if python is not None:
            raise InvalidRequestError("That file says itself which Python it has", hint="Leave out --python.")
        return Image.from_environment(path)
    raise InvalidRequestError(
        f"{file} is no kind of file that declares an image",
        hint="Name a requirements.txt, a pyproject.toml, an environment.yml, a Dockerfile or a file of Python.",
    )


def _declared_in_python(path: Path, variable: str) -> "Image":
    from warmcell.sandbox.images.image import Image

    try:
        found = runpy.run_path(str(path)).get(variable)
    except WarmcellError:
        raise
    except Exception as error:  # whatever a program may raise
        raise InvalidRequestError(f"{path}: {type(error).__name__}: {error}", hint="Mend the file.") from error
    if not isinstance(found, Image):
        raise InvalidRequestError(
            f"{path} declares no image {variable!r}", hint=f'Write {variable} = warmcell.Image.python("3.12")…'
        )
    return found


class BuildProgress:
    """How far a build is: a bar on a terminal, else a line for each step; all of its output where that is wanted."""

    def __init__(self, *, verbose: bool) -> None:
        """Show nothing yet."""
        self._verbose = verbose
        self._bar = sys.stderr.isatty() and not verbose
        self._shown = False

    def line(self, text: str) -> None:
        """A line of the build's output."""
        step = _STEP.fullmatch(text)
        if self._bar and step is not None:
            done, of = int(step[1]) - 1, int(step[2])
            bar = "#" * round(WIDTH * done / max(of, 1))
            print(f"\r[{bar:<{WIDTH}}] {done}/{of} {step[3][:_SHOWN]}\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = True
        elif self._verbose or (step is not None and not self._bar):
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the bar away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()


def _keeper() -> "SyncKeeperClient":
    """The keeper; it is started if need be, for it has the images."""
    keeper = running_keeper(start=True)
    assert keeper is not None
    return keeper
