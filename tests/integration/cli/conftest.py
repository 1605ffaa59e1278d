"""A real keeper for commands to look at, configured by the test."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.leaks import Places
from warmcell.sandbox.client.keeper import SyncKeeperClient

SIMULATED = [{"name": "A100-SXM4-80GB", "memory": "80GiB", "count": 2}]

Configure = Callable[..., None]


@pytest.fixture
def configure(places: Places) -> Configure:
    """Write `jupyter_warmcell_config.py`: `configure(backend="process")`."""

    def write(**traits: object) -> None:
        directory = places.root / "jupyter" / "config"
        directory.mkdir(parents=True, exist_ok=True)
        traits = {"keeper_idle_s": 0.2, "prepared": 0, "simulated_gpus": SIMULATED, "gpu_wait": 0.0, **traits}
        lines = [f"c.Warmcell.{name} = {value!r}" for name, value in traits.items()]
        (directory / "jupyter_warmcell_config.py").write_text("\n".join(lines))

    return write


@pytest.fixture
def keeper(configure: Configure, request: pytest.FixtureRequest) -> Iterator[SyncKeeperClient]:
    """A keeper with the `process` backend, or the one that the test is parametrized with."""
    configure(backend=getattr(request, "param", "process"))
    with SyncKeeperClient.connect() as client:
        yield client


def sandbox_spec(**changes: Any) -> dict[str, Any]:
    """A plain sandbox without a template, as the body of `POST /sandboxes`."""
    return {"spec": {"python": sys.executable, "preload": [], "network": "host", **changes}}
