"""conda's environment files, as far as a Python index can stand for them."""

from pathlib import Path

import pytest

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.images.image import Image


def read(folder: Path, text: str) -> Image:
    """The image of such a file."""
    (folder / "more.txt").write_text("six\n")
    (folder / "environment.yml").write_text(text)
    return Image.from_environment(folder / "environment.yml")


def test_a_python_with_packages_of_pips_and_variables(tmp_path: Path) -> None:
    """It is the same image as one that says so in Python; channels have nothing to give then."""
    image = read(
        tmp_path,
        "name: work\nchannels: [conda-forge]\ndependencies:\n  - python=3.12\n  - pip>=24\n"
        "  - pip:\n    - pandas>=2  # tables\n    - -r more.txt\n    - --pre\nvariables:\n  N: 1\n  A: text\n",
    )
    assert image == Image.python("3.12").env(N="1", A="text").pip_install("pandas>=2", "six", pre=True)


@pytest.mark.parametrize("line", ["python 3.12", "python==3.12", "python = 3.12.*", "python=3.12"])
def test_a_version_of_python_as_people_write_it(tmp_path: Path, line: str) -> None:
    """With one equals sign, two or none."""
    assert read(tmp_path, f"dependencies: ['{line}']") == Image.python("3.12")


def test_without_a_version_it_is_ours(tmp_path: Path) -> None:
    """As everywhere where none is said."""
    assert read(tmp_path, "dependencies: [python, pip]") == Image.python()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dependencies: [numpy, scipy=1.14]", "packages of conda's: numpy, scipy=1.14"),
        ("dependencies: ['conda-forge::numpy']", "packages of conda's"),
        ("dependencies: [python-dateutil]", "packages of conda's: python-dateutil"),
        ("dependencies: ['python>=3.10']", "no version of Python"),
        ("dependencies: ['python=3.12.4']", "no version of Python"),
        ("dependencies: [{pip: [-e .]}]", "cannot be part of an image"),
        ("dependencies: [{npm: [left-pad]}]", "more than names"),
        ("dependencies: numpy", "lists no dependencies"),
        ("dependencies: []\nplatforms: [osx-64]", "'platforms'"),
        ("dependencies: []\nvariables: [A]", "no names with values"),
        ("{", "no YAML"),
        ("- numpy", "lists no dependencies"),
    ],
)
def test_what_it_cannot_stand_for_is_refused(tmp_path: Path, text: str, says: str) -> None:
    """By name, with a cure, and never left out."""
    with pytest.raises(InvalidRequestError, match=says) as refused:
        read(tmp_path, text)
    assert refused.value.hint
