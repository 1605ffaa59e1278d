"""Kernels on images, as people have them: built by the command line, named by a kernelspec, cleared away."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.integration.images.environments import OWN, PLAIN, builder, paths_of, run_in
from tests.integration.images.index import PACKAGE, PrivateIndex, private_index
from tests.jupyter.warmcell_kernels import configure, connected, kernelspec, said, started
from tests.leaks import Places
from warmcell import Image, build_image
from warmcell.extension.cli import main
from warmcell.sandbox.errors import ImageBuildError
from warmcell.sandbox.models import SandboxSpec, Workspace

pytestmark = pytest.mark.bubblewrap

Output = pytest.CaptureFixture[str]


def test_the_command_line_builds_lists_and_removes(places: Places, tmp_path: Path, capsys: Output) -> None:
    """A file of Python says what; the second time nothing is built, and what is removed is gone."""
    with private_index(tmp_path) as served:
        configured(places, served)
        file = tmp_path / "images.py"
        file.write_text(
            "from warmcell import Image\n"
            f"other = Image.python({OWN!r}, kernel=False).pip_install({PACKAGE!r}).env(A='1')\n"
        )
        assert main(["images", "ls"]) == 0
        assert capsys.readouterr().out == "No images.\n"
        assert main(["images", "build", f"{file}:other", "--name", "tiny"]) == 0
        first = capsys.readouterr()
        assert f"[1/2] pip_install {PACKAGE}" in first.err
        asked = len(served.requests)
        assert main(["images", "build", f"{file}:other", "--name", "tiny"]) == 0
        assert capsys.readouterr().out == first.out
        assert len(served.requests) == asked
    assert main(["images", "ls", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["images"]
    assert listed["names"] == ["tiny"]
    assert listed["made_of"] == f"python {OWN} → pip_install {PACKAGE} → env A"
    assert "process" in listed["backends"]
    assert main(["images", "ls"]) == 0
    assert "tiny" in capsys.readouterr().out
    assert main(["images", "rm", "tiny"]) == 0
    assert capsys.readouterr().out == "Removed tiny\n"
    assert main(["images", "rm", "tiny"]) == 1
    assert "There is no image tiny" in capsys.readouterr().err
    assert not Path(listed["python"]).exists()


def configured(places: Places, served: PrivateIndex) -> None:
    configure(places, index_url=served.url, index_certificate=str(served.certificate), build_with_uv=False)


def test_a_build_that_fails_shows_its_output(places: Places, tmp_path: Path, capsys: Output) -> None:
    """On the command line and in Python: the output, the step and the cure."""
    configure(places)
    (tmp_path / "images.py").write_text(
        f"from warmcell import Image\nimage = Image.python({OWN!r}, kernel=False).run('echo what went wrong; exit 3')\n"
    )
    assert main(["images", "build", str(tmp_path / "images.py")]) == 1
    shown = capsys.readouterr().err
    assert "\nwhat went wrong\n" in shown
    assert "exit code 3" in shown
    assert "cure: " in shown
    lines: list[str] = []
    with pytest.raises(ImageBuildError) as caught:
        build_image(PLAIN.run("echo what went wrong; exit 3"), progress=lines.append)
    assert caught.value.details["exit_code"] == 3
    assert "what went wrong" in lines


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("image.py", "image = 3", "declares no image 'image'"),
        ("image.py", "import nothing_of_that_name", "ModuleNotFoundError"),
        ("requirements.txt", "-e .", "cannot be part of an image"),
        ("image.json", "", "no kind of file"),
        ("environment.yml", "dependencies: [python=3.12, ./scipy.conda]", "no package of conda's"),
    ],
)
def test_what_declares_no_image_is_refused(
    places: Places, tmp_path: Path, capsys: Output, name: str, content: str, says: str
) -> None:
    """Before a keeper is started."""
    (tmp_path / name).write_text(content)
    assert main(["images", "build", str(tmp_path / name)]) == 1
    assert says in capsys.readouterr().err
    assert not list(places.runtime.iterdir())


def test_an_image_is_shown_as_a_dockerfile(places: Places, tmp_path: Path, capsys: Output) -> None:
    """Without building anything."""
    (tmp_path / "requirements.txt").write_text("numpy\n")
    assert main(["images", "build", str(tmp_path / "requirements.txt"), "--python", "3.12", "--dockerfile"]) == 0
    assert capsys.readouterr().out.startswith("FROM python:3.12-slim AS stage0\n")
    assert not list(places.runtime.iterdir())


async def test_a_kernel_runs_on_an_image(places: Places, tmp_path: Path) -> None:
    """A kernelspec names it: its packages and variables are there, and it is not removed under the kernel."""
    configure(places)
    image = Image.python(OWN).pip_install("iniconfig").env(GREETING="hello")
    info = await asyncio.to_thread(build_image, image, name="tiny")
    kernelspec(places, image="tiny")
    async with started(cwd=str(tmp_path)) as manager, connected(manager) as client:
        found = await said(client, "import iniconfig, os, sys; print(os.environ['GREETING'], sys.prefix)")
        assert found.split() == ["hello", str(Path(info.python).parent.parent)]
        assert await asyncio.to_thread(main, ["images", "rm", "tiny"]) == 1
    assert await asyncio.to_thread(main, ["images", "rm", "tiny"]) == 0


async def test_an_image_that_nobody_has_built_is_named_by_the_start(places: Places) -> None:
    """The kernel does not start, and the reason says what to do."""
    configure(places)
    kernelspec(places, image="nothing", backend="bubblewrap")
    with pytest.raises(Exception, match="No image nothing was built"):
        async with started(cwd=str(places.root)):
            pass


async def test_a_workspace_around_images_shows_none_but_the_own(places: Places) -> None:
    """The folder of a notebook may hold the keeper's state: of that the sandbox sees what it runs on, and no more."""
    built = await builder(places, uv=True).build(PLAIN.run("true"), tell=lambda line: None)
    (places.state / "environments" / "other").mkdir()
    spec = SandboxSpec(python=built.python, workspace=Workspace(path=str(places.root)))
    code = f"import os; print(os.listdir({str(places.state)!r}), os.listdir({str(places.state / 'environments')!r}))"
    assert await run_in(places, spec, code) == f"['environments'] [{built.digest[7:23]!r}]"
    assert paths_of(places).environments.is_dir()
    assert sys.prefix != str(Path(built.python).parent.parent)
