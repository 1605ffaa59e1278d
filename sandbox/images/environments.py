"""Images for backends that run the machine's own programs: Python environments, each a directory.

uv makes them where it is there, else venv and pip do; those of conda's packages py-rattler does.

An environment is made in a sandbox, under the path that it will have, and gets that name only when it is whole.

Set-up code of packages and an image's commands may write what they like to a cache of packages, and later builds would
install it. So what all builds share is written in a sandbox of its own, by pip or uv alone, before any package can run;
the steps are taken in another one, in which the shared cache can be changed for that build only.
"""

import asyncio
import dataclasses
import errno
import importlib.util
import json
import os
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.backends.files import remove_tree
from warmcell.sandbox.backends.threads import in_thread
from warmcell.sandbox.errors import BackendUnavailableError, ImageBuildError, UnsupportedOperationError, WarmcellError
from warmcell.sandbox.images import pythons
from warmcell.sandbox.images.base import Built, Output, PackageIndex, Tell, full
from warmcell.sandbox.images.bench import Bench, bench
from warmcell.sandbox.images.dockerfile import (
    CONDA_ASKED,
    CONDA_INSTALL,
    SEARCH_PATH,
    conda_files,
    pip_options,
    requirements_file,
)
from warmcell.sandbox.images.image import Image, told
from warmcell.sandbox.images.steps import AptInstall, CondaBase, PipInstall, PythonBase, Run, SetEnv, Step
from warmcell.sandbox.models import Limits, Mount, Network, SandboxSpec, Workspace
from warmcell.sandbox.paths import Paths, private_directory
from warmcell.sandbox.snapshots.disk import sync_filesystem

ABOUT = ".warmcell-image.json"
"""In an environment: what it is. Without it there is none."""
_ID = re.compile(r"[0-9a-f]{16}")
RATTLER = "rattler"
"""What py-rattler is imported as."""
SHARED = ".fetched"
"""Where environments are: the cache that all builds share."""
_BEFORE = ".cache"
"""What it was when builds could write to it at any time."""
_BUILD = "/build"
_OWN_CACHE = f"{_BUILD}/cache"
_CERTIFICATE = f"{_BUILD}/certificate.pem"
_WITH_DOCKER = "Build it for the docker backend: `warmcell images build --backend docker`."


def build_paths(paths: Paths) -> Paths:
    """The directories of sandboxes in which environments are made: what no sandbox sees is elsewhere for them."""
    return Paths(runtime=paths.runtime, state=paths.environments / ".bench", leases=paths.leases)


class EnvironmentBuilder:
    """Implements `ImageBuilder`."""

    name = "environment"
    references = False

    def __init__(
        self, *, paths: Paths, backend: SandboxBackend, index: PackageIndex, network: Network = "host", uv: bool = True
    ) -> None:
        """Configure it.

        Args:
            paths: Of the keeper; environments are below `state`.
            backend: Makes the sandboxes for builds; of `build_paths`.
            index: Where packages come from.
            network: What builds may reach.
            uv: Use it where it is there.
        """
        self._paths = paths
        self._root = paths.environments
        self._backend = backend
        self._index = index
        self._network: Network = network
        self._uv = uv

    async def open(self, known: Collection[str] | None) -> None:
        """Remove what a killed keeper left; see the port."""
        await in_thread(self._tidy, known)

    def _tidy(self, known: Collection[str] | None) -> None:
        private_directory(self._root)
        kept = None if known is None else {self._place(digest).name for digest in known}
        for path in self._root.iterdir():
            unknown = kept is not None and _ID.fullmatch(path.name) and path.name not in kept
            if unknown or path.name.startswith((".new-", ".gone-")) or path.name == _BEFORE:
                remove_tree(path)
        for left in self._root.glob(".bench/layers/*"):
            remove_tree(left)

    def check(self, image: Image) -> None:
        """Packages and commands above a plain Python or conda's packages; see the port."""
        if not isinstance(image.base, PythonBase | CondaBase):
            raise UnsupportedOperationError(
                "Without containers an image begins with Image.python(...) or Image.conda(...): sandboxes run the "
                "machine's own programs",
                hint=_WITH_DOCKER,
            )
        for step in image.steps:
            if isinstance(step, AptInstall):
                raise UnsupportedOperationError(
                    f"Without containers no Debian packages can be installed ({', '.join(step.packages)}): sandboxes "
                    "have the machine's own",
                    hint=f"Install them on this machine and leave the step out. Or: {_WITH_DOCKER}",
                )

    async def find(self, digest: str) -> Built | None:
        """The environment, if its interpreter is still there."""
        return await asyncio.to_thread(self._find, digest)

    def _find(self, digest: str) -> Built | None:
        place = self._place(digest)
        try:
            about = json.loads((place / ABOUT).read_text())
        except (OSError, ValueError):
            return None
        python = place / "bin" / "python"
        if about.get("digest") != digest or not os.access(python, os.X_OK):
            return None
        return Built(digest=digest, reference=digest, python=str(python), size_bytes=int(about["size_bytes"]))

    async def build(self, image: Image, *, tell: Tell, again: bool = False) -> Built:
        """Make the environment; see the port."""
        self.check(image)
        work = self._root / f".new-{secrets.token_hex(6)}"
        output = Output(tell)
        try:
            try:
                await in_thread(self._make_room, work)
                await self._make(image, work, output)
                await in_thread(self._keep, work, image.digest)
            finally:
                await in_thread(remove_tree, work)
        except OSError as error:
            if isinstance(error, WarmcellError):  # A timeout is both.
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise full({"step": "", "exit_code": None, "output": ""}) from error
            raise output.error("the environment", error.strerror or str(error)) from error
        built = await self.find(image.digest)
        if built is None:
            raise output.error("the environment", "its interpreter cannot be run")
        return built

    async def remove(self, digest: str) -> None:
        """Remove the directory."""
        await in_thread(self._remove, digest)

    def _remove(self, digest: str) -> None:
        gone = self._root / f".gone-{secrets.token_hex(6)}"
        try:
            self._place(digest).rename(gone)
        except FileNotFoundError:
            return
        remove_tree(gone)

    def _place(self, digest: str) -> Path:
        """Short, for the first lines of scripts name it."""
        return self._root / digest.removeprefix("sha256:")[:16]

    def _make_room(self, work: Path) -> None:
        private_directory(self._root)
        private_directory(self._backend_state())
        shared = private_directory(self._root / SHARED)
        work.mkdir(mode=0o700)
        caches = (cache / tool for cache in (shared, work / "cache") for tool in ("pip", "uv", "conda"))
        for path in (work / "env", work / "tmp", work / "cache", *caches):
            path.mkdir(mode=0o755, exist_ok=True)
            path.chmod(0o755)

    def _backend_state(self) -> Path:
        return build_paths(self._paths).state

    async def _make(self, image: Image, work: Path, output: Output) -> None:
        base = image.base
        assert isinstance(base, PythonBase | CondaBase)
        uv = await in_thread(pythons.find_uv) if self._uv else None
        if isinstance(base, CondaBase):
            python, rattler = None, await in_thread(_find_rattler)
        else:
            python, rattler = await in_thread(pythons.find_python, base.version), None
            if python is None and uv is None:
                raise BackendUnavailableError(
                    f"There is no Python {base.version} on this machine",
                    hint="Install it, or uv, which fetches it: pip install uv. Or declare another version.",
                )
        target = self._place(image.digest)
        making = _Making(target=target, python=python, uv=uv, index=self._index)
        certificate = self._index.certificate
        if certificate is not None and not certificate.is_file():
            raise BackendUnavailableError(
                f"The certificate {certificate} is not there", hint="Mend c.Warmcell.index_certificate, or PIP_CERT."
            )
        spec = SandboxSpec(
            python=str(python or pythons.own_python()),
            backend=self._backend.name,
            network=self._network,
            limits=Limits(),
            preload=(),
            mounts=(
                Mount(source=str(work / "env"), target=str(target), mode="rw"),
                Mount(source=str(work / "tmp"), target=f"{_BUILD}/tmp", mode="rw"),
                *([] if certificate is None else [Mount(source=str(certificate), target=_CERTIFICATE)]),
                *([] if uv is None else [Mount(source=str(uv), target=f"{_BUILD}/uv")]),
                *([] if rattler is None else [Mount(source=str(rattler), target=f"{_BUILD}/tool/rattler")]),
            ),
        )
        steps = image.all_steps
        for number, step in enumerate(steps, 1):
            if isinstance(step, PipInstall):
                await in_thread(_write, work / "tmp" / _requirements(number), requirements_file(step))
        shared, fetched = str(self._root / SHARED), False
        if isinstance(base, PythonBase):
            alone = dataclasses.replace(spec, mounts=(*spec.mounts, Mount(source=shared, mode="rw")))
            async with bench(self._backend, alone, sandboxes=self._paths.sandboxes, output=output) as at:
                await making.environment(at, base.version, cache=shared)
                fetched = await making.fetch(at, steps, cache=shared)
            for left in (work / "tmp").glob(f"{_FETCHED}*"):
                await in_thread(remove_tree, left)
        own = Mount(source=str(work / "cache"), target=_OWN_CACHE, mode="rw")
        spec = dataclasses.replace(spec, mounts=(*spec.mounts, own), workspace=Workspace(path=shared, mode="cow"))
        async with bench(self._backend, spec, sandboxes=self._paths.sandboxes, output=output) as at:
            if isinstance(base, CondaBase):
                for name, content in conda_files(base).items():
                    await in_thread(_write, work / "tmp" / name, content)
                output.line(told(base))
                await making.of_conda(at, spec.python, base)
            for number, step in enumerate(steps, 1):
                output.line(f"[{number}/{len(steps)}] {told(step)}")
                await making.step(at, step, number, cache=shared if fetched and at.may_change else _OWN_CACHE)

    def _keep(self, work: Path, digest: str) -> None:
        """Give it its name, once all of it is on the disk."""
        made, target = work / "env", self._place(digest)
        about = {"digest": digest, "size_bytes": _size(made)}
        (made / ABOUT).write_text(json.dumps(about))
        sync_filesystem(made)
        self._remove(digest)  # One whose interpreter has gone.
        made.rename(target)


class _Making:
    """What the steps of one environment have in common."""

    def __init__(self, *, target: Path, python: Path | None, uv: Path | None, index: PackageIndex) -> None:
        self._target = target
        self._python = python
        self._uv = uv
        self._conda = index.conda
        self._given = {
            **index.variables(_CERTIFICATE),
            "PATH": f"{target}/bin:{SEARCH_PATH}",
            "VIRTUAL_ENV": str(target),
            "TMPDIR": f"{_BUILD}/tmp",
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
        argv = [python, "-B", f"{_BUILD}/tmp/{CONDA_INSTALL}", f"{_BUILD}/tmp/{CONDA_ASKED}", str(self._target)]
        env = {**self._env(cache=_OWN_CACHE), **self._conda, "PYTHONPATH": f"{_BUILD}/tool"}
        await at.run(told(base), [*argv, f"{_OWN_CACHE}/conda"], env=env)

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
                await at.run(told(step), ["/bin/sh", "-c", step.command], env=self._env(cache=_OWN_CACHE))
            case SetEnv():
                self._variables.update(step.variables)

    def _fetch(self, step: PipInstall, number: int) -> Sequence[str]:
        place = f"{_BUILD}/tmp/{_FETCHED}{number}"
        if self._uv is None:
            return [*self._pip("download", step, number), "--only-binary", ":all:", "--dest", place]
        return [*self._uv_pip(step, number), "--no-build", "--target", place]

    def _install(self, step: PipInstall, number: int) -> Sequence[str]:
        if self._uv is None:
            return self._pip("install", step, number)
        return [*self._uv_pip(step, number), "--compile-bytecode"]

    def _pip(self, verb: str, step: PipInstall, number: int) -> Sequence[str]:
        file = f"{_BUILD}/tmp/{_requirements(number)}"
        return [f"{self._target}/bin/python", "-m", "pip", verb, *pip_options(step), "-r", file]

    def _uv_pip(self, step: PipInstall, number: int) -> Sequence[str]:
        index = ["--default-index", step.index_url] if step.index_url else []
        extra = [word for address in step.extra_index_urls for word in ("--index", address)]
        pre = ["--prerelease", "allow"] if step.pre else []
        python, file = f"{self._target}/bin/python", f"{_BUILD}/tmp/{_requirements(number)}"
        return [*_UV, "pip", "install", "--python", python, *index, *extra, *pre, "-r", file]


_FETCHED = "fetched-"


def _requirements(number: int) -> str:
    """What the file is called that lists what a step installs."""
    return f"requirements-{number}.txt"


_UV = (f"{_BUILD}/uv", "--no-progress", "--color", "never")


def _find_rattler() -> Path:
    """The package py-rattler, which is not imported here. Blocks.

    Raises:
        BackendUnavailableError: It is not there.
    """
    found = importlib.util.find_spec(RATTLER)
    if found is None or not found.submodule_search_locations:
        raise BackendUnavailableError(
            "Packages of conda's are installed by py-rattler, which is not there",
            hint=f"Where Warmcell is: pip install 'warmcell[conda]'. Or: {_WITH_DOCKER}",
        )
    return Path(found.submodule_search_locations[0]).resolve()


def _write(path: Path, content: bytes) -> None:
    """For whoever the sandbox runs as."""
    path.write_bytes(content)
    path.chmod(0o644)


def _size(directory: Path) -> int:
    """Bytes on the disk, of each file once."""
    seen: set[int] = set()
    size = 0
    for top, folders, names in os.walk(directory):
        for name in (*folders, *names):
            about = os.lstat(os.path.join(top, name))
            if about.st_ino not in seen:
                seen.add(about.st_ino)
                size += about.st_blocks * 512
    return size
