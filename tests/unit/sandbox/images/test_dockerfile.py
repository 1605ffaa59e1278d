"""Dockerfiles: what is declared comes out as it is, and nothing of the operator's is in the image."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.sandbox.images.declared import images
from warmcell.sandbox.images.base import PackageIndex
from warmcell.sandbox.images.dockerfile import PYTHON, render
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.images.steps import AptInstall, PipInstall, Run, SetEnv

SECRET = "hunter2"
PRIVATE = PackageIndex(
    url=f"https://user:{SECRET}@pypi.example.com/simple",
    certificate=Path("/etc/company.pem"),
    proxies={"HTTPS_PROXY": f"http://user:{SECRET}@proxy:3128"},
    conda={"CONDA_CHANNEL_ALIAS": f"https://user:{SECRET}@conda.example.com"},
)
indexes = st.sampled_from([PackageIndex(), PRIVATE])


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Lines as engines read them: an instruction and the rest, no line continued."""
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        assert not line.endswith("\\")
        word, _, rest = line.partition(" ")
        assert word in {"FROM", "RUN", "ENV", "ARG", "COPY"}, line
        assert "<<" not in rest or word not in {"RUN", "COPY"}, line  # begins a here-document for some builders
        yield word, rest


def unquoted(word: str) -> str:
    """A word in double quotes as engines read it; a bare `$` would be a variable."""
    assert word.startswith('"')
    assert word.endswith('"')
    inner = word[1:-1]
    assert not re.search(r'(?<!\\)(?:\\\\)*[$"]', inner), word
    return re.sub(r'\\(["$\\])', r"\1", inner)


@given(images(), indexes)
def test_every_step_comes_out_as_it_was_declared(image: Image, index: PackageIndex) -> None:
    """Whatever letters are in it: commands, packages and values are read back unchanged and in their order."""
    made = render(image, base="debian:12", index=index)
    read = list(instructions(made.text))
    runs = [json.loads(rest) for word, rest in read if word == "RUN"]
    assert [argv[2] for argv in runs if argv[:2] == ["/bin/sh", "-c"] and "apt-get" not in argv[2]] == [
        step.command for step in image.steps if isinstance(step, Run) and "apt-get" not in step.command
    ]
    assert [argv[4:] for argv in runs if argv[3:4] == ["apt"]] == [
        list(step.packages) for step in image.steps if isinstance(step, AptInstall)
    ]
    installed = [argv[-1] for argv in runs if argv[:4] == [PYTHON, "-m", "pip", "install"]]
    wanted = [step for step in image.all_steps if isinstance(step, PipInstall)]
    assert [made.files[Path(name).name].decode().splitlines() for name in installed] == [
        list(step.requirements) for step in wanted
    ]
    ours = ("VIRTUAL_ENV=", "CONDA_PREFIX=")
    said = [rest.partition("=") for word, rest in read if word == "ENV" and not rest.startswith(ours)]
    assert [(name, unquoted(value)) for name, _, value in said] == [
        pair for step in image.steps if isinstance(step, SetEnv) for pair in step.variables
    ]


@given(images())
def test_nothing_of_the_operators_is_in_the_file(image: Image) -> None:
    """Index, password and certificate are arguments of the build, in stages of which only the environment is taken."""
    made = render(image, base="debian:12", index=PRIVATE)
    assert SECRET not in made.text
    assert all(SECRET.encode() not in content for content in made.files.values())
    stage = ""
    final = made.text.rpartition("\nFROM ")[2].split()[2] if made.text.count("FROM") > 1 else "stage0"
    for word, rest in instructions(made.text):
        if word == "FROM":
            stage = rest.split()[2]
        if word == "ARG" or "certificate.pem" in rest:
            assert stage.startswith("packages")
    assert final.startswith("stage")


@given(images())
def test_every_stage_goes_on_from_the_one_before(image: Image) -> None:
    """No step is lost between stages: what packages are put above is what the step before has left."""
    stages = [
        rest.split() for word, rest in instructions(render(image, base="b", index=PRIVATE).text) if word == "FROM"
    ]
    assert stages[0] == ["b", "AS", "stage0"]
    for number, (packages, after) in enumerate(zip(stages[1::2], stages[2::2], strict=True)):
        assert packages == [f"stage{number}", "AS", f"packages{number + 1}"]
        assert after == [f"stage{number}", "AS", f"stage{number + 1}"]


def test_where_channels_are_only_what_reads_it_is_told() -> None:
    """Not what pip installs, which runs code of others."""
    packages = render(Image.conda("numpy").pip_install("six"), base="p", index=PRIVATE)
    assert packages.arguments.keys() >= PRIVATE.conda.keys()
    lines = list(instructions(packages.text))
    (place,) = [number for number, line in enumerate(lines) if line == ("ARG", "CONDA_CHANNEL_ALIAS")]
    assert "conda_install.py" in lines[place + 1][1]
    assert lines[place + 2][0] == "FROM"
    assert not render(Image.python("3.12"), base="p", index=PRIVATE).arguments.keys() & PRIVATE.conda.keys()


def test_proxies_are_for_every_build_and_named_in_none() -> None:
    """Engines keep proxies that are not named out of an image's history."""
    made = render(Image.from_registry("debian:12").run("true"), base="debian:12", index=PRIVATE)
    assert made.arguments == PRIVATE.proxies
    assert "PROXY" not in render(Image.python("3.12"), base="p", index=PRIVATE).text


def test_without_an_index_of_the_operators_no_stage_is_needed() -> None:
    """From PyPI packages are installed in place, so they are on the disk once."""
    made = render(Image.python("3.12").pip_install("six"), base="python:3.12-slim")
    assert [word for word, _ in instructions(made.text)] == ["FROM", "RUN", "ENV", "COPY", "RUN", "COPY", "RUN"]
    assert made.python == PYTHON
    assert render(Image.from_registry("debian:12").run("true"), base="debian:12").python == ""


def test_where_packages_come_from_is_read_as_pip_reads_it() -> None:
    """What is configured goes before the environment, whose own further indexes then do not count."""
    environ = {"PIP_INDEX_URL": "https://a/", "PIP_EXTRA_INDEX_URL": "https://b/ https://c/", "PIP_CERT": "/c.pem"}
    assert PackageIndex.from_environment(environ) == PackageIndex(
        url="https://a/", extra_urls=("https://b/", "https://c/"), certificate=Path("/c.pem")
    )
    assert PackageIndex.from_environment(environ, url="https://d/", certificate="/d.pem") == PackageIndex(
        url="https://d/", certificate=Path("/d.pem")
    )
    assert not PackageIndex.from_environment({}).private
