"""A notebook whose kernel is in a container, in a real browser."""

import re

import pytest
from playwright.sync_api import Page

from tests.browser.lab import Lab
from tests.browser.notebook import Notebook
from tests.engines import IMAGE, Dockerd
from tests.leaks import Places

pytestmark = [pytest.mark.browser, pytest.mark.docker, pytest.mark.criu]

CELLS = ("count = 0\nimport sys\nprint('begun with', sys.executable)", "count += 1\nprint('count is', count)")
RUNNING = ("ps", "--quiet", "--filter", "label=warmcell.sandbox")


def test_a_notebook_in_a_container_restarts_and_is_suspended_and_resumed(
    places: Places, docker: Dockerd, page: Page
) -> None:
    """The image's Python runs its cells; a restart forgets the variables; while it is suspended there is no container,
    and the cell that wakes it has them.
    """
    with Lab(places, settings={"docker_host": docker.host, "prepared": 0}) as lab:
        lab.kernelspec(
            "contained", "In a container", {"backend": "docker", "image": IMAGE, "preload": [], "template": "plain"}
        )
        lab.notebook("work.ipynb", *CELLS, kernel="contained", display_name="In a container")
        notebook = Notebook.open(page, lab, "work.ipynb")
        notebook.wait_ready()
        notebook.run(0, expected="begun with /usr/bin/python3")
        notebook.restart()
        notebook.run(1, expected="NameError")
        notebook.run(0, expected="begun with /usr/bin/python3")
        notebook.run(1, expected="count is 1")
        assert len(docker.docker(*RUNNING).split()) == 1

        notebook.kernel_menu("Suspend Kernel")
        notebook.wait_ready("CPU · suspended")
        assert docker.docker(*RUNNING) == ""
        notebook.run(1, expected="count is 2")
        notebook.wait_ready(re.compile(r"resumed · \d"))
