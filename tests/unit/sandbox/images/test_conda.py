"""conda's environment files, and packages of conda's as they are declared."""

from pathlib import Path

import pytest

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.images.steps import CondaBase


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


@pytest.mark.parametrize("line", ["numpy", "conda-forge::numpy", "python-dateutil", "python>=3.10", "python=3.12.4"])
def test_what_only_conda_has_makes_it_an_environment_of_condas(tmp_path: Path, line: str) -> None:
    """With the file's channels, of which `nodefaults` is none; conda-forge where it names none."""
    text = f"dependencies: ['{line}', 'pip>=24', {{pip: [six]}}]"
    assert read(tmp_path, text) == Image.conda(line, "pip>=24", channels=["conda-forge"]).pip_install("six")
    named = read(tmp_path, f"{text}\nchannels: [own, defaults, nodefaults]")
    assert named.base == Image.conda(line, "pip>=24", channels=["own", "defaults"]).base


def test_what_every_image_needs_is_added_unless_it_is_named() -> None:
    """By its name alone, whatever channel and version it has been named with."""
    made = Image.conda("python =3.12", "own::ipykernel=7.1=h*", "numpy[build=h*]").base
    assert isinstance(made, CondaBase)
    assert made.all_packages == (*made.packages, "pip")
    plain = Image.conda("numpy", kernel=False).base
    assert isinstance(plain, CondaBase)
    assert plain.all_packages == ("numpy", "python", "pip")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dependencies: ['https://example.com/numpy-1.0-0.conda']", "no package of conda's"),
        ("dependencies: ['--numpy']", "no package of conda's"),
        ("dependencies: [numpy]\nchannels: conda-forge", "no list"),
        ("dependencies: [numpy]\nchannels: ['../own']", "no channel"),
        ("dependencies: [numpy]\nchannels: ['https://user:secret@example.com/own']", "a user or a password"),
        ("dependencies: [numpy]\nchannels: ['https://example.com/t/secret/own']", "a token"),
        ("dependencies: ['t/secret/own::numpy']", "a token"),
        ("dependencies: [numpy]\nchannels: ['file:///srv/own']", "no address"),
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
