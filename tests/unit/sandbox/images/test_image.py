"""Declaring images: values, digests, and what cannot be declared."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given

from tests.unit.sandbox.images.declared import images
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.images.steps import PipInstall


@given(images())
def test_a_declaration_survives_the_wire(image: Image) -> None:
    """What comes out of JSON is equal and has the same digest."""
    back = Image.from_json(json.loads(json.dumps(image.to_json())))
    assert back == image
    assert back.digest == image.digest


@given(images(), images())
def test_digests_are_equal_where_declarations_are(one: Image, other: Image) -> None:
    """Two declarations have one digest if, and only if, they say the same in the same order."""
    assert (one.digest == other.digest) == (one == other)


def test_order_and_place_of_steps_count() -> None:
    """Nothing is sorted or merged: packages, steps and their division are part of what is declared."""
    base = Image.python("3.12")
    digests = [
        base.pip_install("a", "b").digest,
        base.pip_install("b", "a").digest,
        base.pip_install("a").pip_install("b").digest,
        base.run("x").pip_install("a", "b").digest,
        base.pip_install("a", "b").run("x").digest,
        base.pip_install("a", "b", pre=True).digest,
        base.pip_install("a", "b", extra_index_url="https://example.com/simple").digest,
        Image.python("3.11").pip_install("a", "b").digest,
        Image.python("3.12", kernel=False).pip_install("a", "b").digest,
    ]
    assert len(set(digests)) == len(digests)


def test_a_digest_stays_what_it_is() -> None:
    """Images that were built with an earlier version are found again: the form of a declaration is fixed."""
    image = Image.python("3.12").pip_install("torch", "pandas").apt_install("ffmpeg").run("echo").env(B="2", A="1")
    assert image.digest == "sha256:2c57e6e56d3fa78055bb0869a3dd118886c19ed2b34bedf0da564d65ce5eede3"


def test_an_image_is_a_value() -> None:
    """A verb gives another image; what it was called on stays as it is, and equal ones are one key."""
    base = Image.python("3.12")
    more = base.pip_install("numpy")
    assert base.steps == ()
    assert more == Image.python("3.12").pip_install(["numpy"])
    assert len({more, Image.python("3.12").pip_install("numpy")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        more.base = base.base  # type: ignore[misc]


def test_variables_of_one_call_have_no_order() -> None:
    """Where a dictionary came from does not decide the digest, and the last value of a name holds."""
    assert Image.python("3.12").env(A="1", B="2") == Image.python("3.12").env({"B": "2"}, A="1")
    assert Image.python("3.12").env(A="1").env(A="2", B="").variables == {"A": "2", "B": ""}


@pytest.mark.parametrize(
    "package",
    [
        "",
        " ",
        "-r/etc/passwd",
        "--index-url=https://evil.example/",
        "numpy\n--index-url https://evil.example/",
        "numpy\r--pre",
        "numpy; rm -rf /",
        "numpy && true",
        "numpy --pre",
        "numpy --hash=sha256:zz",
        "$(id)",
        "./local",
        "/etc/passwd",
        "pkg @ file:///etc/passwd",
        "pkg @ https://user:password@example.com/pkg-1-py3-none-any.whl",
        "pkg @ https://${PIP_INDEX_URL}/pkg-1-py3-none-any.whl",
        "pkg @ git+ssh://git@example.com/pkg",
        "nu\u200bmpy",
        "a" * 20_000,
    ],
)
def test_what_is_no_requirement_is_refused(package: str) -> None:
    """A package's name can be no option, no second line, no command, no file of this machine and no password."""
    with pytest.raises(InvalidRequestError) as caught:
        Image.python("3.12").pip_install("pandas", package)
    assert caught.value.hint


@pytest.mark.parametrize(
    "package",
    [
        "numpy",
        "torch==2.8.0+cpu",
        "uvicorn[standard]>=0.30,<1",
        "tomli; python_version < '3.11'",
        "pkg @ https://example.com/pkg-1.0-py3-none-any.whl#sha256=" + "0" * 64,
        "pkg @ git+https://example.com/pkg@v1",
        f"six==1.17.0 --hash=sha256:{'0' * 64} --hash=sha256:{'1' * 64}",
    ],
)
def test_what_pip_installs_can_be_named(package: str) -> None:
    """Versions, extras, markers, addresses and hashes are written as for pip."""
    (step,) = Image.python("3.12").pip_install(f" {package} ").steps
    assert step == PipInstall(requirements=(package,))


@pytest.mark.parametrize("package", ["", "-y", "ffmpeg git", "a;b", "FFmpeg", "a\nb", "$x", "a`id`", "../x", "a=1 b"])
def test_what_is_no_debian_package_is_refused(package: str) -> None:
    """A name that apt or a shell would read as something else never gets there."""
    with pytest.raises(InvalidRequestError):
        Image.python("3.12").apt_install(package)


@pytest.mark.parametrize(
    "reference",
    ["", "-x", "a b", "a\nRUN id", "UPPER", "a:b:c", "x@sha256:12", "a AS stage0", "https://x/y", "a//b", "$X"],
)
def test_what_is_no_reference_is_refused(reference: str) -> None:
    """What an engine would read as something else is no base."""
    with pytest.raises(InvalidRequestError):
        Image.from_registry(reference)


@pytest.mark.parametrize(
    "reference", ["debian", "python:3.12-slim", "a.example.com:5000/team/x_y:v1", f"x@sha256:{'a' * 64}"]
)
def test_references_are_as_engines_write_them(reference: str) -> None:
    """Registries with ports, tags and digests can be named."""
    assert reference in str(Image.from_registry(reference))


@pytest.mark.parametrize(
    ("name", "value"),
    [("A B", ""), ("", "x"), ("1A", "x"), ("A=B", "x"), ("A", "two\nlines"), ("A", "\0"), ("A", "\ud800")],
)
def test_what_is_no_variable_is_refused(name: str, value: str) -> None:
    """A variable has a plain name and one line of text."""
    with pytest.raises(InvalidRequestError):
        Image.python("3.12").env({name: value})


@pytest.mark.parametrize("version", ["", "3", "2.7", "3.8", "3.12\n", "3.12-slim", "latest", "3.1"])
def test_what_is_no_version_is_refused(version: str) -> None:
    """Kernels need Python 3.9, and a version is written with its minor number."""
    with pytest.raises(InvalidRequestError):
        Image.python(version)


@pytest.mark.parametrize("command", ["", "  ", "a\0b", "\ud800", "x" * 20_000])
def test_what_is_no_command_is_refused(command: str) -> None:
    """A shell gets text of one program's arguments."""
    with pytest.raises(InvalidRequestError):
        Image.python("3.12").run(command)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"format": 2, "base": {"kind": "python", "version": "3.12"}, "steps": []},
        {"format": 1, "base": {"kind": "python", "version": "3.12"}, "steps": {}},
        {"format": 1, "base": {"kind": "nothing"}, "steps": []},
        {"format": 1, "base": {"kind": ["python"]}, "steps": []},
        {"format": 1, "base": {"kind": "python", "version": "1"}, "steps": []},
        {"format": 1, "base": {"kind": "python", "version": "3.12"}, "steps": [None]},
        {"format": 1, "base": {"kind": "python", "version": "3.12"}, "steps": [{"kind": "run", "command": ""}]},
        {"format": 1, "base": {"kind": "python", "version": "3.12"}, "steps": [{"kind": "run"}]},
        {"format": 1, "base": {"kind": "python", "version": "3.12"}, "steps": [{"kind": "env", "variables": [["A"]]}]},
        {
            "format": 1,
            "base": {"kind": "dockerfile", "dockerfile": "FROM x", "context": [{"path": "../x"}]},
            "steps": [],
        },
    ],
)
def test_what_is_no_declaration_is_refused(data: object) -> None:
    """What comes over a wire is checked as what is written in Python is."""
    with pytest.raises(InvalidRequestError):
        Image.from_json(data)


def test_a_dockerfiles_files_are_part_of_the_digest(tmp_path: Path) -> None:
    """Another content, another name or another mode is another image; what is ignored is not."""
    (tmp_path / "Dockerfile").write_text("FROM debian\nCOPY a b /\n")
    (tmp_path / ".dockerignore").write_text("**/*.log\nbig\n!big/kept\n# a comment\n")
    (tmp_path / "a").write_text("1")
    (tmp_path / "big").mkdir()

    def digest() -> str:
        return Image.from_dockerfile(tmp_path / "Dockerfile", context_dir=tmp_path).digest

    found = [digest()]
    (tmp_path / "a").write_text("2")
    found.append(digest())
    (tmp_path / "a").chmod(0o755)
    found.append(digest())
    (tmp_path / "a").rename(tmp_path / "b")
    found.append(digest())
    (tmp_path / "link").symlink_to("b")
    found.append(digest())
    (tmp_path / "big" / "kept").write_text("3")
    found.append(digest())
    assert len(set(found)) == len(found)
    (tmp_path / "big" / "data").write_text("4")
    (tmp_path / "x.log").write_text("5")
    (tmp_path / "big" / "y.log").write_text("6")
    assert digest() == found[-1]


def test_too_large_a_folder_is_refused(tmp_path: Path) -> None:
    """What does not fit into a declaration is said with its cure."""
    (tmp_path / "Dockerfile").write_text("FROM debian\n")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(9 * 2**20)
    with pytest.raises(InvalidRequestError, match="more than 8 MiB") as caught:
        Image.from_dockerfile(tmp_path / "Dockerfile", context_dir=tmp_path)
    assert ".dockerignore" in caught.value.hint


def test_an_image_says_what_it_is_made_of() -> None:
    """One line for lists, however long it is."""
    image = Image.python("3.12").pip_install("torch", "pandas").apt_install("ffmpeg").run("a\nb").env(A="1")
    assert str(image) == "python 3.12 → pip_install torch pandas → apt_install ffmpeg → run a b → env A"
    assert len(str(Image.python("3.12").pip_install(*["numpy"] * 100))) < 100
