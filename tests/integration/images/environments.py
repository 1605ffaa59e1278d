"""An environment builder as the keeper has it, and a look into what it builds."""

import dataclasses
import os
import sys

from tests.leaks import Places
from warmcell.sandbox.backends.bubblewrap import BubblewrapBackend
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.ids import new_sandbox_id
from warmcell.sandbox.images.base import PackageIndex
from warmcell.sandbox.images.environments import EnvironmentBuilder, build_paths
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.paths import Paths

OWN = f"{sys.version_info.major}.{sys.version_info.minor}"
PLAIN = Image.python(OWN, kernel=False)
PYPI = PackageIndex.from_environment(os.environ)


def paths_of(places: Places) -> Paths:
    return Paths(places.runtime, places.state, places.leases).make()


def builder(
    places: Places, *, uv: bool, index: PackageIndex = PYPI, network: str = "host", cache_bytes: int | None = None
) -> EnvironmentBuilder:
    """One of this test's directories."""
    paths = paths_of(places)
    return EnvironmentBuilder(
        paths=paths,
        backend=BubblewrapBackend(paths=build_paths(paths)),
        index=index,
        network="none" if network == "none" else "host",
        uv=uv,
        cache_bytes=cache_bytes,
    )


def left(places: Places) -> list[str]:
    """What lies where environments are, hidden directories of ours apart."""
    directory = places.state / "environments"
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if path.name not in {".bench", ".fetched", ".known"})


async def run_in(places: Places, spec: SandboxSpec, code: str) -> str:
    """What Python code prints in a sandbox of that spec."""
    paths = paths_of(places)
    sandbox_id = new_sandbox_id()
    directory = paths.sandboxes / sandbox_id
    directory.mkdir(mode=0o700)
    spec = dataclasses.replace(spec, backend="bubblewrap", preload=())
    instance = await BubblewrapBackend(paths=paths).create(spec, sandbox_id=sandbox_id, directory=directory)
    try:
        channel = await GuestChannel.open(instance.run_directory)
        done = await channel.exec([spec.python, "-c", code], env=spec.env, timeout=60)
        await channel.close()
    finally:
        await instance.stop()
        directory.rmdir()
    assert done.exit_code == 0, done.stderr
    return done.stdout.strip()
