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
import logging
import os
import re
import secrets
from collections.abc import Collection
from pathlib import Path

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.backends.files import remove_tree
from warmcell.sandbox.backends.threads import in_thread
from warmcell.sandbox.errors import BackendUnavailableError, UnsupportedOperationError, WarmcellError
from warmcell.sandbox.images import pythons
from warmcell.sandbox.images.base import Built, Output, PackageIndex, Tell, full
from warmcell.sandbox.images.bench import bench
from warmcell.sandbox.images.dockerfile import conda_files, requirements_file
from warmcell.sandbox.images.image import Image, told
from warmcell.sandbox.images.making import ASKED, BUILD, CERTIFICATE, FETCHED, OWN_CACHE, Making, requirements_name
from warmcell.sandbox.images.steps import AptInstall, CondaBase, PipInstall, PythonBase
from warmcell.sandbox.models import Limits, Mount, Network, SandboxSpec, Workspace
from warmcell.sandbox.paths import Paths, private_directory
from warmcell.sandbox.snapshots.disk import sync_filesystem

log = logging.getLogger(__name__)

ABOUT = ".warmcell-image.json"
"""In an environment: what it is. Without it there is none."""
_ID = re.compile(r"[0-9a-f]{16}")
RATTLER = "rattler"
"""What py-rattler is imported as."""
SHARED = ".fetched"
"""Where environments are: the cache that all builds share."""
_BEFORE = ".cache"
"""What it was when builds could write to it at any time."""
_WITH_DOCKER = "Build it for the docker backend: `warmcell images build --backend docker`."


def build_paths(paths: Paths) -> Paths:
    """The directories of sandboxes in which environments are made: what no sandbox sees is elsewhere for them."""
    return Paths(runtime=paths.runtime, state=paths.environments / ".bench", leases=paths.leases)


class EnvironmentBuilder:
    """Implements `ImageBuilder`."""

    name = "environment"
    references = False

    def __init__(
        self,
        *,
        paths: Paths,
        backend: SandboxBackend,
        index: PackageIndex,
        network: Network = "host",
        uv: bool = True,
        cache_bytes: int | None = None,
    ) -> None:
        """Configure it.

        Args:
            paths: Of the keeper; environments are below `state`.
            backend: Makes the sandboxes for builds; of `build_paths`.
            index: Where packages come from.
            network: What builds may reach.
            uv: Use it where it is there.
            cache_bytes: Most that what builds share may take on the disk once they are done; None: no cap.
        """
        self._paths = paths
        self._root = paths.environments
        self._backend = backend
        self._index = index
        self._network: Network = network
        self._uv = uv
        self._cache_bytes = cache_bytes
        self._builds = 0

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
        self._builds += 1
        try:
            try:
                await in_thread(self._make_room, work)
                await self._make(image, work, output)
                await in_thread(self._keep, work, image.digest)
            finally:
                self._builds -= 1
                await in_thread(remove_tree, work)
                await self._bound_cache()
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

    async def _bound_cache(self) -> None:
        """Empty what builds share if it is larger than it may be, and none is at work that would miss it.

        All of it goes: uv believes of a wheel that it has kept that all its files are there. What comes of it is
        nothing to the build that is done.
        """
        shared, gone = self._root / SHARED, self._root / f".gone-{secrets.token_hex(6)}"
        try:
            if self._cache_bytes is None or self._builds or await in_thread(_size, shared) <= self._cache_bytes:
                return
            if not self._builds:  # None has begun meanwhile, and none does before it has another name.
                shared.rename(gone)
                await in_thread(remove_tree, gone)
        except OSError as error:  # Of a build that began meanwhile, files come and go.
            log.info("what builds share in %s is left as it is: %s", shared, error)

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
        for path in (work / "env", work / "tmp", work / "asked", work / "cache", *caches):
            _open_to_all(path)

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
        making = Making(target=target, python=python, uv=uv, index=self._index)
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
                Mount(source=str(work / "tmp"), target=f"{BUILD}/tmp", mode="rw"),
                Mount(source=str(work / "asked"), target=ASKED),
                *([] if certificate is None else [Mount(source=str(certificate), target=CERTIFICATE)]),
                *([] if uv is None else [Mount(source=str(uv), target=f"{BUILD}/uv")]),
                *([] if rattler is None else [Mount(source=str(rattler), target=f"{BUILD}/tool/rattler")]),
            ),
        )
        steps = image.all_steps
        for number, step in enumerate(steps, 1):
            if isinstance(step, PipInstall):
                await in_thread(_write, work / "asked" / requirements_name(number), requirements_file(step))
        shared, fetched = str(self._root / SHARED), False
        if isinstance(base, PythonBase):
            alone = dataclasses.replace(spec, mounts=(*spec.mounts, Mount(source=shared, mode="rw")))
            async with bench(self._backend, alone, sandboxes=self._paths.sandboxes, output=output) as at:
                await making.environment(at, base.version, cache=shared)
                fetched = await making.fetch(at, steps, cache=shared)
            for left in (work / "tmp").glob(f"{FETCHED}*"):
                await in_thread(remove_tree, left)
        own = Mount(source=str(work / "cache"), target=OWN_CACHE, mode="rw")
        spec = dataclasses.replace(spec, mounts=(*spec.mounts, own), workspace=Workspace(path=shared, mode="cow"))
        async with bench(self._backend, spec, sandboxes=self._paths.sandboxes, output=output) as at:
            if isinstance(base, CondaBase):
                for name, content in conda_files(base).items():
                    await in_thread(_write, work / "asked" / name, content)
                output.line(told(base))
                await making.of_conda(at, spec.python, base)
            for number, step in enumerate(steps, 1):
                output.line(f"[{number}/{len(steps)}] {told(step)}")
                await making.step(at, step, number, cache=shared if fetched and at.may_change else OWN_CACHE)

    def _keep(self, work: Path, digest: str) -> None:
        """Give it its name, once all of it is on the disk."""
        made, target = work / "env", self._place(digest)
        about = {"digest": digest, "size_bytes": _size(made)}
        remove_tree(made / ABOUT)  # A step may have put anything there, and a link leads to the host's own files.
        _write(made / ABOUT, json.dumps(about).encode())
        sync_filesystem(made)
        self._remove(digest)  # One whose interpreter has gone.
        made.rename(target)


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
    """A new file, for whoever the sandbox runs as."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), 0o644)


def _open_to_all(directory: Path) -> None:
    """Have a directory that whoever the sandbox runs as can use. A build before may have put a link in its place."""
    if not (directory.is_dir() and not directory.is_symlink()):
        directory.unlink(missing_ok=True)
        directory.mkdir()
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(handle, 0o755)
    finally:
        os.close(handle)


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
