"""A declaration as a Dockerfile. Nothing of the machine is read or asked here.

Commands stand in the form of JSON, so that neither the engine's parser nor a shell of its own reads them. The Python
packages of an image are in a virtual environment of its own, above those that the base brings.

An index or a certificate of the operator's must not be in the image, and what a step is given the engine keeps in its
history. So where there is one, packages are installed in a stage beside, of which only the environment is taken over.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from warmcell.sandbox.images.base import PackageIndex
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.images.steps import AptInstall, CondaBase, PipInstall, PythonBase, Run, SetEnv, Step

ENVIRONMENT = "/opt/venv"
PYTHON = f"{ENVIRONMENT}/bin/python"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATE = "certificate.pem"
CONDA_ASKED, CONDA_INSTALL = "conda.json", "conda_install.py"
CONDA_PYTHON = "3.12"
"""What installs conda's packages runs on, and they lie above."""
RATTLER = "py-rattler>=0.28,<1"
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
        elif isinstance(image.base, CondaBase):
            self._conda(image.base)
        for number, step in enumerate(image.all_steps, 1):
            self._step(step, number)
        return Rendered(
            text="\n".join(self._lines) + "\n",
            files=self._files,
            arguments={
                **self._index.proxies,
                **(self._variables() if self._files else {}),
                **(self._index.conda if isinstance(image.base, CondaBase) else {}),
            },
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

    def _conda(self, base: CondaBase) -> None:
        """Made in a stage beside, as what makes it has no place in the image."""
        self._has_environment = True
        files = conda_files(base)
        self._files.update(files)
        tool = f"{_PLACE}/tool"
        self._beside(
            [
                run("python3", "-m", "venv", tool),
                f"COPY {json.dumps([*files, *self._certificate, f'{_PLACE}/'])}",
                run(f"{tool}/bin/python", "-m", "pip", "install", *PIP_OPTIONS, "--no-cache-dir", RATTLER),
                *(f"ARG {name}" for name in self._index.conda),
                run(
                    *(f"{tool}/bin/python", f"{_PLACE}/{CONDA_INSTALL}", f"{_PLACE}/{CONDA_ASKED}", ENVIRONMENT),
                    f"{_PLACE}/cache",
                ),
            ]
        )
        self._lines += [
            f"COPY --from=packages{self._stage} {json.dumps([ENVIRONMENT, ENVIRONMENT])}",
            f'ENV CONDA_PREFIX="{ENVIRONMENT}" PATH="{ENVIRONMENT}/bin:${{PATH:-{SEARCH_PATH}}}"',
        ]

    def _beside(self, lines: Sequence[str]) -> None:
        """A stage that does this, of which what is to stay is copied; and the next one, which goes on from the last."""
        before, self._stage = self._stage, self._stage + 1
        self._lines += [f"FROM stage{before} AS packages{self._stage}"]
        # Engines know the proxies by themselves, and keep those that are not named here out of their history.
        self._lines += [f"ARG {name}" for name in self._variables() if name not in self._index.proxies]
        self._lines += [*lines, f"FROM stage{before} AS stage{self._stage}"]

    @property
    def _certificate(self) -> Sequence[str]:
        return () if self._index.certificate is None else (CERTIFICATE,)

    def _variables(self) -> Mapping[str, str]:
        return self._index.variables(f"{_PLACE}/{CERTIFICATE}")

    def _pip(self, step: PipInstall, number: int) -> None:
        self._environment()
        name = f"requirements-{number}.txt"
        self._files[name] = requirements_file(step)
        install = [
            f"COPY {json.dumps([name, *self._certificate, f'{_PLACE}/'])}",
            run(PYTHON, "-m", "pip", "install", *pip_options(step), "--no-cache-dir", "-r", f"{_PLACE}/{name}"),
        ]
        if not self._index.private:
            self._lines += install
            return
        self._beside(install)
        self._lines += [
            run("rm", "-rf", ENVIRONMENT),  # Else what was replaced would still be there.
            f"COPY --from=packages{self._stage} {json.dumps([ENVIRONMENT, ENVIRONMENT])}",
        ]


PIP_OPTIONS = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off")


def requirements_file(step: PipInstall) -> bytes:
    """What is installed, as pip and uv read it from a file. Each line was checked to be one requirement."""
    return "".join(f"{line}\n" for line in step.requirements).encode()


def conda_files(base: CondaBase) -> Mapping[str, bytes]:
    """What installs packages of conda's, and which."""
    asked = {"channels": base.channels, "packages": base.all_packages}
    program = resources.files("warmcell.sandbox.images").joinpath(CONDA_INSTALL).read_bytes()
    return {CONDA_ASKED: json.dumps(asked).encode(), CONDA_INSTALL: program}


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
