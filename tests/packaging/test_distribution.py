"""The sdist, the wheel that is built from it, and what a fresh environment gets from that wheel."""

import json
import re
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lanes import TOP
from tests.leaks import Places

PACKAGES = ("sandbox", "kernel_provisioner", "extension")
LABEXTENSION = "share/jupyter/labextensions/@warmcell/labextension"


@dataclass(frozen=True, slots=True)
class Built:
    """The two archives and the names in them, without their leading folder."""

    wheel: Path
    wheel_names: frozenset[str]
    sdist_names: frozenset[str]

    @property
    def data(self) -> frozenset[str]:
        """What the wheel puts below the environment's prefix."""
        return frozenset(name.split(".data/data/")[1] for name in self.wheel_names if ".data/data/" in name)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist of the checkout and a wheel of that sdist."""
    assert (TOP / "src/warmcell/labextension/static/style.js").exists(), "build the labextension first: make build"
    out = tmp_path_factory.mktemp("dist")
    argv = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(TOP)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        sdist_names = frozenset(name.partition("/")[2] for name in archive.getnames())
    return Built(wheel, frozenset(zipfile.ZipFile(wheel).namelist()), sdist_names)


def _sources(folder: str) -> set[str]:
    """Files of a package that git knows or would take."""
    argv = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    listed = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=TOP, check=True).stdout
    return {name for name in listed.splitlines() if (TOP / name).exists()}


@pytest.mark.parametrize("folder", PACKAGES)
def test_wheel_has_every_module(built: Built, folder: str) -> None:
    """The wheel that came from the sdist has the whole package, under its import name."""
    expected = {f"warmcell/{name}" for name in _sources(folder) if name.endswith(".py")}
    assert expected
    assert expected <= built.wheel_names


def test_wheel_has_nothing_but_the_package(built: Built) -> None:
    """No TypeScript, no tests, no second copy of a package, nothing at the top of site-packages."""
    assert {name.split("/")[0].split("-")[0] for name in built.wheel_names} == {"warmcell"}
    assert not [name for name in built.wheel_names if name.endswith((".ts", ".tsx")) or "node_modules" in name]
    assert not [name for name in built.wheel_names if name.startswith(("warmcell/labextension", "warmcell/tests"))]
    assert "warmcell/py.typed" in built.wheel_names


def test_wheel_has_jupyters_files(built: Built) -> None:
    """Built labextension, kernelspec and server configuration land where Jupyter looks for them."""
    assert "etc/jupyter/jupyter_server_config.d/warmcell.json" in built.data
    assert "share/jupyter/kernels/warmcell/kernel.json" in built.data
    for name in ("package.json", "install.json", "static/style.js"):
        assert f"{LABEXTENSION}/{name}" in built.data
    for schema in (TOP / "labextension/schema").glob("*.json"):
        assert f"{LABEXTENSION}/schemas/@warmcell/labextension/{schema.name}" in built.data
    assert any(re.search(r"static/remoteEntry\.\w+\.js$", name) for name in built.data)
    assert not any(name.endswith("build_log.json") for name in built.data), "it names paths of the building machine"


def test_sdist_can_be_built_again(built: Built) -> None:
    """The sdist has sources and the built labextension, and neither symlinked copies nor installed packages."""
    for name in ("package.json", "yarn.lock", ".yarnrc.yml", "tsconfig.json", "labextension/src/index.ts", "LICENSE"):
        assert name in built.sdist_names
    assert "src/warmcell/labextension/static/style.js" in built.sdist_names
    assert not [name for name in built.sdist_names if re.match(rf"src/warmcell/({'|'.join(PACKAGES)})(/|$)", name)]
    assert not [name for name in built.sdist_names if "node_modules" in name or name.startswith("labextension/lib")]


@pytest.fixture(scope="module")
def fresh(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of a new environment with the wheel in it, which borrows its dependencies from this one."""
    prefix = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True, timeout=60)
    install = [sys.executable, "-m", "pip", "--python", str(prefix / "bin/python"), "install", "--no-deps", "--quiet"]
    subprocess.run([*install, str(built.wheel)], check=True, timeout=60)
    (site_packages,) = prefix.glob("lib/python*/site-packages")
    borrowed = Path(next(path for path in sys.path if path.endswith("site-packages")))
    (site_packages / "borrowed.pth").write_text(f"{borrowed}\n")
    return prefix


def _env(prefix: Path, places: Places) -> dict[str, str]:
    """No Node on PATH, nobody's own Jupyter directories, JupyterLab's own application from this environment."""
    return {
        **places.env,
        "HOME": str(places.root),
        "PATH": f"{prefix}/bin:{sys.prefix}/bin",
        "JUPYTERLAB_DIR": f"{sys.prefix}/share/jupyter/lab",
        "JUPYTER_PREFER_ENV_PATH": "1",
    }


def _jupyter(prefix: Path, places: Places, *argv: str) -> str:
    command = [str(prefix / "bin/python"), "-m", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=_env(prefix, places))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_wheel_imports_from_its_own_environment(fresh: Path, places: Places) -> None:
    """The installed copy is what is imported, not the checkout."""
    code = "import warmcell.sandbox.models as m; print(m.__file__)"
    done = subprocess.run(
        [str(fresh / "bin/python"), "-c", code], capture_output=True, text=True, timeout=60, env=_env(fresh, places)
    )
    assert done.stdout.startswith(str(fresh)), done.stdout + done.stderr


def test_labextension_is_found_without_node(fresh: Path, places: Places) -> None:
    """`jupyter labextension list` names it as enabled and OK."""
    listed = re.sub(r"\x1b\[\d*m", "", _jupyter(fresh, places, "jupyterlab.labextensions", "list"))
    assert re.search(r"@warmcell/labextension v[\d.]+ enabled +OK", listed), listed


def test_kernelspec_is_found(fresh: Path, places: Places) -> None:
    """`jupyter kernelspec list` has it, with our provisioner and a sandboxing launcher as its argv."""
    said = _jupyter(fresh, places, "jupyter_client.kernelspecapp", "list", "--json")
    listed = json.loads(said[said.index("{\n") : said.rindex("}") + 1])
    spec = listed["kernelspecs"]["warmcell"]
    assert Path(spec["resource_dir"]).is_relative_to(fresh)
    assert spec["spec"]["metadata"]["kernel_provisioner"]["provisioner_name"] == "warmcell"
    assert spec["spec"]["argv"][1:3] == ["-m", "warmcell.kernel_provisioner.launch"]


def test_server_extension_is_enabled(fresh: Path, places: Places) -> None:
    """`jupyter server extension list` finds it enabled and valid."""
    listed = re.sub(r"\x1b\[\d*m", "", _jupyter(fresh, places, "jupyter_server.extension.serverextension", "list"))
    assert re.search(r"warmcell(\.extension\.server)? enabled", listed), listed
    assert re.search(r"warmcell\S* \S+ +OK", listed), listed


@pytest.fixture
def lab(fresh: Path, places: Places) -> Iterator[str]:
    """The URL, with its token, of a JupyterLab from the fresh environment."""
    work = places.root / "work"
    work.mkdir()
    options = ["--no-browser", "--port=0", "--ServerApp.token=t", "--ServerApp.root_dir=" + str(work), "--allow-root"]
    server = subprocess.Popen(
        [str(fresh / "bin/python"), "-m", "jupyterlab", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**_env(fresh, places), "JUPYTER_ALLOW_INSECURE_WRITES": "0"},
        cwd=work,
    )
    assert server.stderr is not None
    try:
        said = []
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"http://localhost:(\d+)/lab", line):
                yield f"http://127.0.0.1:{found[1]}"
                break
        else:
            pytest.fail("JupyterLab did not start:\n" + "".join(said))
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_lab_serves_the_extension(lab: str) -> None:
    """`jupyter lab` in that environment gives the page our extension, and the extension its files."""
    deadline = time.monotonic() + 60
    while True:
        try:
            page = urllib.request.urlopen(f"{lab}/lab?token=t", timeout=60).read().decode()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
    config = json.loads(re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    entry = next(e for e in config["federated_extensions"] if e["name"] == "@warmcell/labextension")
    load = f"{lab}/lab/extensions/@warmcell/labextension/{entry['load']}"
    assert urllib.request.urlopen(load, timeout=10).status == 200
