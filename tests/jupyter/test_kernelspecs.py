"""Kernelspecs of other environments: written, found by Jupyter, removed."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

from tests.lanes import TOP
from tests.leaks import Places
from warmcell.kernel_provisioner import kernelspecs
from warmcell.kernel_provisioner.kernelspecs import install, remove
from warmcell.sandbox.errors import InvalidRequestError, NotFoundError


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An environment without ipykernel."""
    path = tmp_path_factory.mktemp("environments") / "empty"
    venv.create(path, with_pip=False)
    return str(path / "bin" / "python")


def test_jupyter_finds_what_was_installed(places: Places) -> None:
    """Under its name, started by our provisioner with that Python, and with our own command line for others."""
    made = install(sys.executable, name="train", config={"memory": "2GiB"})
    spec = KernelSpecManager().get_kernel_spec("train")
    assert spec.resource_dir == made.directory == str(Path(places.env["JUPYTER_DATA_DIR"]) / "kernels" / "train")
    assert spec.metadata["kernel_provisioner"] == {
        "provisioner_name": "warmcell",
        "config": {"memory": "2GiB", "python": sys.executable},
    }
    assert spec.argv[:5] == [sys.executable, "-m", "warmcell.kernel_provisioner.launch", "-f", "{connection_file}"]
    assert json.loads(spec.argv[-1]) == spec.metadata["kernel_provisioner"]["config"]
    assert spec.interrupt_mode == "message"
    assert "Warmcell" in spec.display_name
    assert {path.name for path in Path(made.directory).glob("logo-*")} == {
        "logo-32x32.png",
        "logo-64x64.png",
        "logo-svg.svg",
    }


def test_names_are_made_from_the_environment(tmp_path: Path) -> None:
    """The folder's name, or its project's where that says nothing; below a prefix if one is given."""
    for folder, name in (("My Env", "warmcell-my-env"), ("project/.venv", "warmcell-project")):
        path = tmp_path / folder
        venv.create(path, with_pip=False, system_site_packages=False)
        site = next((path / "lib").glob("python*/site-packages"))
        (site / "ipykernel.py").write_text("__version__ = '7'")
        made = install(str(path / "bin" / "python"), prefix=str(tmp_path / "prefix"))
        assert made.name == name
        assert Path(made.directory) == tmp_path / "prefix" / "share" / "jupyter" / "kernels" / name


def test_an_installation_replaces_the_one_before(places: Places) -> None:
    """The same name twice is the second."""
    install(sys.executable, name="train", display_name="One")
    install(sys.executable, name="train", display_name="Two")
    assert KernelSpecManager().get_kernel_spec("train").display_name == "Two"


@pytest.mark.parametrize(
    ("python", "says"),
    [("/no/such/python", "no Python interpreter that runs"), ("/bin/true", "no Python interpreter that runs")],
)
def test_what_is_no_python_is_refused(places: Places, python: str, says: str) -> None:
    """Before anything is written."""
    with pytest.raises(InvalidRequestError, match=says) as caught:
        install(python, name="x")
    assert caught.value.hint
    with pytest.raises(NoSuchKernel):
        KernelSpecManager().get_kernel_spec("x")


def test_an_environment_without_ipykernel_gets_the_cure(empty: str) -> None:
    """The command that installs it, for that very interpreter."""
    with pytest.raises(InvalidRequestError, match="has no ipykernel") as caught:
        install(empty)
    assert caught.value.hint == f"Install it: {empty} -m pip install ipykernel"


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "with space"},
        {"name": ""},
        {"user": True, "prefix": "/tmp"},
        {"config": {"memory": "much"}},
        {"config": {"wish": 1}},
        {"prefix": "/proc/nowhere"},
    ],
)
def test_what_cannot_be_installed_is_one_clear_error(places: Places, wrong: dict[str, object]) -> None:
    """Each with its cure."""
    with pytest.raises(InvalidRequestError) as caught:
        install(sys.executable, **{"name": "x", **wrong})  # type: ignore[arg-type]
    assert caught.value.hint


def test_only_ours_are_removed(places: Places) -> None:
    """An unknown name and another's kernelspec are told apart."""
    made = install(sys.executable, name="gone")
    assert str(remove("gone")) == made.directory
    with pytest.raises(NotFoundError):
        remove("gone")
    foreign = Path(places.env["JUPYTER_DATA_DIR"]) / "kernels" / "foreign"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text('{"argv": ["x"], "display_name": "x", "language": "x"}')
    with pytest.raises(InvalidRequestError, match="none of Warmcell's"):
        remove("foreign")
    assert foreign.is_dir()


def test_the_shipped_kernelspec_is_of_the_same_form() -> None:
    """What the wheel installs is what `install` would write for the environment that Jupyter runs in."""
    shipped = json.loads((TOP / "kernel_provisioner" / "kernelspec" / "kernel.json").read_text())
    written = kernelspecs.spec("Python 3 (Warmcell)", {})
    assert shipped["argv"] == ["python", *written["argv"][1:5]]
    for name in ("display_name", "language", "interrupt_mode"):
        assert shipped[name] == written[name]
    assert shipped["metadata"]["kernel_provisioner"]["provisioner_name"] == "warmcell"


def test_logos_are_small_pictures() -> None:
    """PNGs of the sizes that their names say, and an SVG without anything from elsewhere."""
    folder = TOP / "kernel_provisioner" / "kernelspec"
    for size in (32, 64):
        data = (folder / f"logo-{size}x{size}.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (size, size)
        assert len(data) < 8192
    drawn = (folder / "logo-svg.svg").read_text()
    assert drawn.startswith("<svg")
    assert drawn.rstrip().endswith("</svg>")
    assert "href" not in drawn


def test_importing_writes_nothing_and_is_light() -> None:
    """The entry point's module loads neither tornado's server nor torch, and touches no file."""
    code = (
        "import sys; import warmcell.kernel_provisioner.provisioner; "
        "print([name for name in ('torch', 'jupyter_server', 'numpy') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
