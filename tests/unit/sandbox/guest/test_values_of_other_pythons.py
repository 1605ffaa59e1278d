"""Values between two versions of Python: plain ones go, and code, which the other would read wrong, is refused."""

import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest

from tests import pythons
from tests.lanes import TOP
from warmcell.sandbox.guest import values

READS = """
import sys
sys.path[:0] = [sys.argv[1]]
from warmcell_guest import values
try:
    found = values.loads(sys.stdin.buffer.read())
except values.CannotTravelError as error:
    print(error)
else:
    print({name: value(1) if callable(value) else value for name, value in found.items()})
"""


def doubled(x: int) -> int:
    return 2 * x


doubled.__module__ = "__main__"  # As in a notebook: it goes by value.


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the guest's package as it is called in a sandbox, and with cloudpickle."""
    folder = tmp_path_factory.mktemp("guest")
    (folder / "warmcell_guest").symlink_to(TOP / "sandbox" / "guest")
    (folder / "cloudpickle").symlink_to(Path(cloudpickle.__file__).parent)
    return folder


def read(python: Path, guest: Path, data: bytes) -> str:
    """What that Python makes of it; it may not crash."""
    done = subprocess.run([python, "-I", "-B", "-c", READS, guest], input=data, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def test_functions_go_to_the_same_python(guest: Path) -> None:
    """By value, through another process."""
    assert read(Path(sys.executable), guest, values.dumps({"f": doubled, "n": [1, "a"]})) == "{'f': 2, 'n': [1, 'a']}"


def test_functions_do_not_go_to_another_python(guest: Path) -> None:
    """Each version on this machine says so, with both versions and what to do; what is no code arrives."""
    others = pythons.others()
    if not others:
        pytest.skip("no other version of Python was found; WARMCELL_TEST_PYTHONS=/path/of/python3.13:… names some")
    here = "{}.{}".format(*sys.version_info)
    for version, python in others.items():
        assert read(python, guest, values.dumps({"n": [1, "a"], "s": {2.5}})) == "{'n': [1, 'a'], 's': {2.5}}"
        for value in (doubled, {"inside": [lambda x: x]}, type("Made", (), {"__module__": "__main__", "m": doubled})):
            said = read(python, guest, values.dumps({"value": value}))
            there = "{}.{}".format(*version)
            assert said.startswith(
                f"Functions and classes that were made in Python {here} cannot run in Python {there}. "
            )
            assert said.endswith("or put them into a module beside the notebook.")
