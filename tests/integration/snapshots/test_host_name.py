"""What a kernel's machine is called: programs keep it in lock files, caches and logs."""

from pathlib import Path

import pytest

from tests.integration.snapshots.notebooks import clones, end_all, keeper, notebook, page
from tests.integration.snapshots.test_faults_storage import gone
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

NAME = "import socket; print(socket.gethostname(), open('/etc/hostname').read().strip() == socket.gethostname())"


async def test_a_kernel_keeps_its_hosts_name_and_a_clone_has_another(places: Places, tmp_path: Path) -> None:
    """Resumed, put back, and taken up by another keeper it has the name that it had."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        name = await made.run(NAME)
        assert name.endswith(" True")
        await made.do("suspend")
        assert await made.run(NAME) == name
        await made.do("snapshot", name="then")
        await made.do("restore", snapshot="then")
        assert await made.run(NAME) == name
        async with clones(made, 2) as forked:
            others = [await one.run(NAME) for one in forked]
            assert len({name, *others}) == 3
            await forked[0].do("suspend")
            assert await forked[0].run(NAME) == others[0]
        await made.do("suspend")
        await gone(client, signum=15)
        async with await KeeperClient.connect() as second, page(made.body["connection"]) as opened:
            assert await opened.run(NAME) == name
            await end_all(second)
