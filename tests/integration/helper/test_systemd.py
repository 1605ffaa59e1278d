"""The helper as systemd has it: installed, watched, and there until the last of its users' programs has gone."""

import json
import sys
import time

import pytest

from tests.integration.helper.booted import booted
from tests.leaks import Places
from warmcell.extension.helper_setup import UNIT

pytestmark = [pytest.mark.root, pytest.mark.criu]

WARMCELL = (sys.executable, "-m", "warmcell.extension.cli")

KEEPER = """
[Unit]
After=systemd-user-sessions.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sh -c '{look} > /run/outside/found'
"""
"""Ordered as systemd orders each session and each user's own manager, in which keepers run."""


def test_installed_on_a_machine_that_systemd_runs(places: Places) -> None:
    """It is ready, comes back after it was killed, and a keeper that is told of a shutdown can still save kernels."""
    with booted(places) as system:
        assert f"started {UNIT}" in system.run(*WARMCELL, "helper", "install")
        said = json.loads(system.run(*WARMCELL, "helper", "status", "--json"))
        assert (said["ready"], said["makes"]) == (True, True), said
        system.run("systemctl", "kill", "--signal=KILL", UNIT)
        deadline = time.monotonic() + 60
        while system.run("systemctl", "show", "--property=NRestarts,ActiveState", UNIT).split() != [
            "NRestarts=1",
            "ActiveState=active",
        ]:
            assert time.monotonic() < deadline, system.run("systemctl", "status", UNIT, check=False)
        look = " ".join((*WARMCELL, "helper", "status", "--json"))
        system.write("keeper.service", KEEPER.format(look=look))
        system.run("systemctl", "start", "systemd-user-sessions.service", "keeper.service")
        system.shut_down()
        assert json.loads((system.outside / "found").read_text())["ready"]
