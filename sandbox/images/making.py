"""What the steps of an environment run in their sandboxes: uv, or venv and pip, or py-rattler."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from warmcell.sandbox.errors import ImageBuildError
from warmcell.sandbox.images.base import Output, PackageIndex
from warmcell.sandbox.images.bench import Bench
from warmcell.sandbox.images.dockerfile import CONDA_ASKED, CONDA_INSTALL, SEARCH_PATH, pip_options
from warmcell.sandbox.images.image import told
from warmcell.sandbox.images.steps import CondaBase, PipInstall, Run, SetEnv, Step

BUILD = "/build"
ASKED = f"{BUILD}/asked"
"""What steps are to read. They may change all else of the build's, and put links where files of ours were."""
OWN_CACHE = f"{BUILD}/cache"
"""A cache of the build's own."""
CERTIFICATE = f"{BUILD}/certificate.pem"
FETCHED = "fetched-"
"""How directories in `tmp` begin in which is what was fetched, for the cache's sake alone."""


class Making:
    """What the steps of one environment have in common."""

    def __init__(self, *, target: Path, python: Path | None, uv: Path | None, index: PackageIndex) -> None:
        self._target = target
        self._python = python
        self._uv = uv
        self._conda = index.conda
        self._given = {
            **index.variables(CERTIFICATE),
            "PATH": f"{target}/bin:{SEARCH_PATH}",
            "VIRTUAL_ENV": str(target),
            "TMPDIR": f"{BUILD}/tmp",
            "UV_PYTHON_INSTALL_DIR": f"{target}/python",
            "UV_NO_CONFIG": "1",
            "UV_NO_PROGRESS": "1",
            "UV_LINK_MODE": "copy",
            "UV_INDEX_STRATEGY": "unsafe-best-match",  # As pip does, so that an image is the same with both.
        }
        self._variables: dict[str, str] = {}

    def _env(self, *, cache: str) -> Mapping[str, str]:
        caches = {"PIP_CACHE_DIR": f"{cache}/pip", "UV_CACHE_DIR": f"{cache}/uv"}
        return {**self._given, **caches, **self._variables}

    async def environment(self, at: Bench, version: str, *, cache: str) -> None:
        """Make the environment, with pip in it."""
        step, env = "the virtual environment", self._env(cache=cache)
        if self._uv is not None:
            argv = [*_UV, "venv", "--quiet", "--seed", "--python", str(self._python or version), str(self._target)]
            await at.run(step, argv, env=env)
            return
        await at.run(step, [str(self._python), "-I", "-m", "venv", "--without-pip", str(self._target)], env=env)
        # By itself, since venv keeps what it says for itself.
        await at.run(step, [f"{self._target}/bin/python", "-I", "-m", "ensurepip", "--default-pip"], env=env)

    async def of_conda(self, at: Bench, python: str, base: CondaBase) -> None:
        """Make one of conda's packages, by a Python that sees py-rattler in `tool`. Only this learns of channels."""
        argv = [python, "-B", f"{ASKED}/{CONDA_INSTALL}", f"{ASKED}/{CONDA_ASKED}", str(self._target)]
        env = {**self._env(cache=OWN_CACHE), **self._conda, "PYTHONPATH": f"{BUILD}/tool"}
        await at.run(told(base), [*argv, f"{OWN_CACHE}/conda"], env=env)

    async def fetch(self, at: Bench, steps: Sequence[Step], *, cache: str) -> bool:
        """Have all packages in the cache, in an environment that has none yet; nothing of any package is run.

        False where that cannot be: some have to be built, or are not to be had.
        """
        quiet = dataclasses.replace(at, output=Output(lambda line: None))  # What is wrong the steps will say.
        env = {**self._env(cache=cache), "UV_LINK_MODE": "symlink"}
        try:
            for number, step in enumerate(steps, 1):
                if isinstance(step, PipInstall):
                    at.output.line(f"fetching what {told(step)} needs")
                    await quiet.run(told(step), self._fetch(step, number), env=env)
        except ImageBuildError:
            return False
        return True

    async def step(self, at: Bench, step: Step, number: int, *, cache: str) -> None:
        """Take one. The cache is for what is installed; what commands fetch by themselves is gone afterwards."""
        match step:
            case PipInstall():
                await at.run(told(step), self._install(step, number), env=self._env(cache=cache))
            case Run():
                await at.run(told(step), ["/bin/sh", "-c", step.command], env=self._env(cache=OWN_CACHE))
            case SetEnv():
                self._variables.update(step.variables)

    def _fetch(self, step: PipInstall, number: int) -> Sequence[str]:
        place = f"{BUILD}/tmp/{FETCHED}{number}"
        if self._uv is None:
            python, *pip = self._pip("download", step, number)
            return [python, "-c", _STARTS_NOTHING, *pip[2:], "--only-binary", ":all:", "--dest", place]
        return [*self._uv_pip(step, number), "--no-build", "--target", place]

    def _install(self, step: PipInstall, number: int) -> Sequence[str]:
        if self._uv is None:
            return self._pip("install", step, number)
        return [*self._uv_pip(step, number), "--compile-bytecode"]

    def _pip(self, verb: str, step: PipInstall, number: int) -> Sequence[str]:
        file = f"{ASKED}/{requirements_name(number)}"
        return [f"{self._target}/bin/python", "-m", "pip", verb, *pip_options(step), "-r", file]

    def _uv_pip(self, step: PipInstall, number: int) -> Sequence[str]:
        index = ["--default-index", step.index_url] if step.index_url else []
        extra = [word for address in step.extra_index_urls for word in ("--index", address)]
        pre = ["--prerelease", "allow"] if step.pre else []
        python, file = f"{self._target}/bin/python", f"{ASKED}/{requirements_name(number)}"
        return [*_UV, "pip", "install", "--python", python, *index, *extra, *pre, "-r", file]


def requirements_name(number: int) -> str:
    """What the file is called that lists what a step installs."""
    return f"requirements-{number}.txt"


_STARTS_NOTHING = """\
import runpy, sys
programs = {"subprocess.Popen", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system"}
def refuse(event, arguments):
    if event in programs:
        raise PermissionError("nothing is run for what is fetched")
sys.addaudithook(refuse)
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
"""pip that begins no program: sources at an address it would build, though it is told to take wheels only."""

_UV = (f"{BUILD}/uv", "--no-progress", "--color", "never")
