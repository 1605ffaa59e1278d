"""One keeper, and one sandbox, for all that looks at them only."""

from collections.abc import Iterator

import pytest

from tests.integration.sandboxes.index import PackageServer, package_server
from tests.leaks import Places, own_places
from warmcell import Sandbox
from warmcell.sandbox.client.keeper import SyncKeeperClient


@pytest.fixture(scope="package")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackageServer]:
    """The operator's package index."""
    with package_server(tmp_path_factory.mktemp("index")) as server:
        yield server


@pytest.fixture(scope="package")
def home(index: PackageServer) -> Iterator[Places]:
    """Directories of one keeper for all tests of this folder."""
    with own_places() as made:
        config = made.root / "jupyter" / "config"
        config.mkdir(parents=True)
        lines = ["c.Warmcell.backend = 'bubblewrap'", "c.Warmcell.prepared = 0", "c.Warmcell.keeper_idle_s = 0.2"]
        lines += [f"c.Warmcell.index_url = {index.url!r}", f"c.Warmcell.index_certificate = {str(index.certificate)!r}"]
        lines += ["c.Warmcell.egress_private_index = True"]
        (config / "jupyter_warmcell_config.py").write_text("\n".join(lines))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in made.env.items():
                patch.setenv(name, value)
            with SyncKeeperClient.connect() as keeper:  # It stays as long as somebody is connected.
                yield made
                for sandbox in keeper.get("/sandboxes")["sandboxes"]:
                    keeper.delete(f"/sandboxes/{sandbox['id']}")


@pytest.fixture(autouse=True)
def at_home(places: Places, home: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test starts belongs to that keeper."""
    for name, value in home.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="package")
def shared_box(home: Places) -> Iterator[Sandbox]:
    """One sandbox for the tests that leave it as it is."""
    with Sandbox(preload=(), timeout=None, env={"SAID": "to all"}) as box:
        yield box


@pytest.fixture
def box(at_home: None, shared_box: Sandbox) -> Sandbox:
    return shared_box
