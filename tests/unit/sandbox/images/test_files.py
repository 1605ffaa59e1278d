"""Requirements files and projects, read into steps."""

from pathlib import Path

import pytest

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.images.steps import PipInstall, Step


def requirements(path: Path) -> Step:
    (step,) = Image.python("3.12").pip_install_from_requirements(path).steps
    return step


def test_a_requirements_file_is_read_as_pip_reads_it(tmp_path: Path) -> None:
    """Comments, joined lines, hashes, included files and other indexes."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "base.txt").write_text("six\n-r deeper.txt\n")
    (tmp_path / "more" / "deeper.txt").write_text("idna # for names\n")
    (tmp_path / "requirements.txt").write_text(
        "\ufeff# what we need\n"
        "numpy >= 2  # numbers\n"
        "-r more/base.txt\n"
        "--extra-index-url https://download.example.com/cpu\n"
        "--pre\n--no-cache-dir\n"
        f"torch==2.8.0 \\\n    --hash=sha256:{'0' * 64} \\\n    --hash=sha256:{'1' * 64}\n"
        "\n"
        "pkg @ https://example.com/pkg-1-py3-none-any.whl#egg=pkg\n"
        "tomli; python_version < '3.11'"
    )
    assert requirements(tmp_path / "requirements.txt") == PipInstall(
        requirements=(
            "numpy >= 2",
            "six",
            "idna",
            f"torch==2.8.0 --hash=sha256:{'0' * 64} --hash=sha256:{'1' * 64}",
            "pkg @ https://example.com/pkg-1-py3-none-any.whl#egg=pkg",
            "tomli; python_version < '3.11'",
        ),
        extra_index_urls=("https://download.example.com/cpu",),
        pre=True,
    )


@pytest.mark.parametrize(
    "line",
    [
        "-e .",
        "--editable=.",
        "./wheel.whl",
        "-c constraints.txt",
        "--find-links /srv/wheels",
        "--index-url https://user:secret@example.com/simple",
        "--index-url file:///srv/simple",
        "-r missing.txt",
        "-r requirements.txt",
        "numpy; nonsense ==",
    ],
)
def test_a_line_that_cannot_be_part_of_an_image_is_named(tmp_path: Path, line: str) -> None:
    """Nothing of a file is left out silently: what this machine alone has, or nobody may see, is refused."""
    (tmp_path / "requirements.txt").write_text(f"six\n{line}\n")
    with pytest.raises(InvalidRequestError) as caught:
        requirements(tmp_path / "requirements.txt")
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def test_a_projects_dependencies_are_installed_and_not_the_project(tmp_path: Path) -> None:
    """Its dependencies in their order, with the groups that are asked for, each once."""
    path = tmp_path / "pyproject.toml"
    path.write_text(
        '[project]\nname = "p"\ndependencies = ["six", "idna>=3"]\n'
        '[project.optional-dependencies]\nplots = ["matplotlib", "six"]\n'
    )
    image = Image.python("3.12").pip_install_from_pyproject(path, optional_dependencies=["plots"])
    assert image.steps == (PipInstall(requirements=("six", "idna>=3", "matplotlib")),)
    with pytest.raises(InvalidRequestError, match="no optional dependencies 'gpu'") as caught:
        Image.python("3.12").pip_install_from_pyproject(path, optional_dependencies=["gpu"])
    assert "plots" in caught.value.hint


@pytest.mark.parametrize("text", ["", "[project]\n", "not toml =", "[project]\ndependencies = 3\n", "project = 3\n"])
def test_what_is_no_project_is_refused(tmp_path: Path, text: str) -> None:
    """A broken file, or one that lists nothing, is an error and no empty image."""
    path = tmp_path / "pyproject.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequestError):
        Image.python("3.12").pip_install_from_pyproject(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Which one it was stands in the error."""
    with pytest.raises(InvalidRequestError, match=r"nothing\.txt cannot be read"):
        Image.python("3.12").pip_install_from_requirements(tmp_path / "nothing.txt")
