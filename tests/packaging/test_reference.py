"""Pages that are made from the code, or whose examples the code must understand."""

import re
import subprocess
import sys

import pytest

from tests.lanes import TOP
from warmcell.sandbox.gpus.requests import parse
from warmcell.sandbox.gpus.simulated import SimulatedInventory


def test_the_command_line_page_is_up_to_date() -> None:
    """docs/reference/cli.md is what `scripts/cli-reference` prints now."""
    command = [sys.executable, str(TOP / "scripts" / "cli-reference")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    page = (TOP / "docs" / "reference" / "cli.md").read_text()
    assert page == done.stdout, "run scripts/cli-reference > docs/reference/cli.md"


def test_the_tables_of_backends_are_what_they_declare() -> None:
    """docs/reference/backends.md and contract.md have what `scripts/backends-table` would write."""
    command = [sys.executable, str(TOP / "scripts" / "backends-table"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"run scripts/backends-table; it would write\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", [*sorted(TOP.glob("docs/**/*.md")), TOP / "README.md"], ids=lambda page: page.stem)
def test_commands_in_pages_exist(page) -> None:  # type: ignore[no-untyped-def]
    """Each `warmcell …` that a page tells people to type is a command."""
    known = set(re.findall(r"^## warmcell ([a-z]+)", (TOP / "docs" / "reference" / "cli.md").read_text(), re.M))
    typed = set(re.findall(r"(?:\$ (?:\S*/)?|`)warmcell ([a-z]+)", page.read_text()))
    assert typed <= known


def test_the_gpu_page_asks_as_the_grammar_does() -> None:
    """Each request in the table of docs/howto/gpus.md is understood."""
    page = (TOP / "docs" / "howto" / "gpus.md").read_text()
    table = page.partition("| request |")[2].partition("\n\n")[0]
    requests = [
        request for cell in re.findall(r"^\| (`.*?) \|", table, re.M) for request in re.findall(r"`(.*?)`", cell)
    ]
    assert len(requests) > 6
    assert all(parse(request) for request in requests)


async def test_the_gpu_pages_configuration_is_one() -> None:
    """The simulated devices that the page configures are made from it."""
    page = (TOP / "docs" / "howto" / "gpus.md").read_text()
    written = page.partition("c.Warmcell.simulated_gpus = ")[2].partition("```")[0]
    devices = await SimulatedInventory(eval(written)).devices()
    assert [device.name for device in devices] == ["A100-SXM4-80GB", "A100-SXM4-80GB", "T4"]
