"""The examples that use sandboxes run as they stand."""

import re
import subprocess
import sys

import pytest

from tests.lanes import TOP
from warmcell import Sandbox

pytestmark = [pytest.mark.bubblewrap, pytest.mark.criu]


def test_rollouts_get_better_from_copies_of_the_best(at_home: None) -> None:
    """Two rounds of 16 copies each; the second does not end worse than the first; nothing is left of them."""
    done = subprocess.run(
        [sys.executable, str(TOP / "examples" / "rollouts.py")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rounds = re.findall(r"^round \d: 16 copies in \d+ ms, best reward (-\d+\.\d+), worst", done.stdout, re.M)
    assert len(rounds) == 2
    assert [float(one) for one in rounds] == sorted(float(one) for one in rounds)
    assert "found [" in done.stdout
    assert Sandbox.list(tags={"example": "rollouts"}) == []


@pytest.mark.parametrize("page", ["README.md", "docs/howto/agents.md"])
def test_the_snippets_that_people_copy_run(at_home: None, page: str) -> None:
    """The first lines on sandboxes of each page do what they say; two copies stand for eight."""
    block = re.search(r"```python\n(from warmcell import Sandbox\n.*?)```", (TOP / page).read_text(), re.S)
    assert block is not None
    code = block[1].replace("fork(8)", "fork(2)").replace("Sandbox()", "Sandbox(preload=(), tags={'page': 'yes'})")
    names: dict[str, object] = {}
    exec(compile(code, page, "exec"), names)
    copies = names["boxes"]
    assert isinstance(copies, list)
    assert [copy.run("x").text is not None for copy in copies] == [True, True]
    for copy in copies:
        copy.kill()
        copy.close()
    assert Sandbox.list(tags={"page": "yes"}) == []
