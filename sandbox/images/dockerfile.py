"""A declaration as a Dockerfile. Pure: nothing is read or asked here.

Commands stand in the form of JSON, so that neither the engine's parser nor a shell of its own reads them. The Python
packages of an image are in a virtual environment of its own, above those that the base brings.

An index or a certificate of the operator's must not be in the image, and what a step is given the engine keeps in its
history. So where there is one, packages are installed in a stage beside, of which only the environment is taken over.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from warmcell.sandbox.images.base import PackageIndex
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.images.steps import AptInstall, PipInstall, PythonBase, Run, SetEnv, Step

ENVIRONMENT = "/opt/venv"
PYTHON = f"{ENVIRONMENT}/bin/python"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATE = "certificate.pem"
_PLACE = "/opt/warmcell"
_APT = (
    'export DEBIAN_FRONTEND=noninteractive; apt-get update && apt-get install -y --no-install-recommends -- "$@"'
    " && rm -rf /var/lib/apt/lists/*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A Dockerfile with what it needs."""

    text: str
    files: Mapping[str, bytes]
    """Files of its context, the certificate apart, by name."""
    arguments: Mapping[str, str]
    """Build arguments; they are nowhere in the image."""
    certificate: Path | None
    """What is to be in the context as `CERTIFICATE`."""
    python: str
    """The image's interpreter; empty where it is the base's."""


def render(image: Image, *, base: str, index: PackageIndex | None = None) -> Rendered:
    """The Dockerfile of an image.

    Args:
        image: What is declared.
        base: What the engine calls that with which it begins.
        index: Where packages come from. None, or nothing in it: from PyPI, and no stages beside are needed.
    """
    return _Rendering(base, index or PackageIndex()).of(image)


class _Rendering:
    def __init__(self, base: str, index: PackageIndex) -> None:
        self._index = index
        self._lines = [f"FROM {base} AS stage0"]
        self._stage = 0
        self._has_environment = False
        self._files: dict[str, bytes] = {}

    def of(self, image: Image) -> Rendered:
        if isinstance(image.base, PythonBase):
            self._environment()
        for number, step in enumerate(image.all_steps, 1):
            self._step(step, number)
        return Rendered(
            text="\n".join(self._lines) + "\n",
            files=self._files,
            arguments={**self._index.proxies, **(self._variables() if self._files else {})},
            certificate=self._index.certificate if self._files else None,
            python=PYTHON if self._has_environment else "",
        )

    def _step(self, step: Step, number: int) -> None:
        match step:
            case PipInstall():
                self._pip(step, number)
            case AptInstall():
                self._lines.append(run("/bin/sh", "-c", _APT, "apt", *step.packages))
            case Run():
                self._lines.append(run("/bin/sh", "-c", step.command))
            case SetEnv():
                self._lines += [f"ENV {name}={quoted(value)}" for name, value in step.variables]

    def _environment(self) -> None:
        if not self._has_environment:
            self._has_environment = True
            self._lines += [
                run("python3", "-m", "venv", "--system-site-packages", ENVIRONMENT),
                f'ENV VIRTUAL_ENV="{ENVIRONMENT}" PATH="{ENVIRONMENT}/bin:${{PATH:-{SEARCH_PATH}}}"',
            ]

    def _variables(self) -> Mapping[str, str]:
        return self._index.variables(f"{_PLACE}/{CERTIFICATE}")

    def _pip(self, step: PipInstall, number: int) -> None:
        self._environment()
        name = f"requirements-{number}.txt"
        self._files[name] = requirements_file(step)
        certificate = () if self._index.certificate is None else (CERTIFICATE,)
        install = [
            f"COPY {json.dumps([name, *certificate, f'{_PLACE}/'])}",
            run(PYTHON, "-m", "pip", "install", *pip_options(step), "--no-cache-dir", "-r", f"{_PLACE}/{name}"),
        ]
        if not self._index.private:
            self._lines += install
            return
        before, self._stage = self._stage, self._stage + 1
        self._lines += [f"FROM stage{before} AS packages{self._stage}"]
        # Engines know the proxies by themselves, and keep those that are not named here out of their history.
        self._lines += [f"ARG {name}" for name in self._variables() if name not in self._index.proxies]
        self._lines += install
        self._lines += [
            f"FROM stage{before} AS stage{self._stage}",
            run("rm", "-rf", ENVIRONMENT),  # Else what was replaced would still be there.
            f"COPY --from=packages{self._stage} {json.dumps([ENVIRONMENT, ENVIRONMENT])}",
        ]


PIP_OPTIONS = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off")


def requirements_file(step: PipInstall) -> bytes:
    """What is installed, as pip and uv read it from a file. Each line was checked to be one requirement."""
    return "".join(f"{line}\n" for line in step.requirements).encode()


def pip_options(step: PipInstall) -> tuple[str, ...]:
    """What is said of a step besides."""
    index = ("--index-url", step.index_url) if step.index_url else ()
    extra = (word for address in step.extra_index_urls for word in ("--extra-index-url", address))
    return (*PIP_OPTIONS, *index, *extra, *(("--pre",) if step.pre else ()))


def run(*argv: str) -> str:
    """An instruction that runs it as it stands."""
    # `<` could begin a here-document for some builders, and JSON can do without it.
    return f"RUN {json.dumps(argv)}".replace("<", "\\u003c")


def quoted(value: str) -> str:
    """A word of an instruction in which nothing is replaced."""
    said = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
    return f'"{said}"'
