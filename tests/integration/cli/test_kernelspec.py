"""`warmcell kernelspec`: from a Python environment to an entry in Jupyter's launcher, and back."""

import json
import sys
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager

from tests.leaks import Places
from warmcell.extension.cli import main

Output = pytest.CaptureFixture[str]


def listed(capsys: Output) -> dict[str, dict[str, object]]:
    capsys.readouterr()
    assert main(["kernelspec", "list", "--json"]) in {0, 3}
    return {spec["name"]: spec for spec in json.loads(capsys.readouterr().out)["kernelspecs"]}


def test_an_environment_is_installed_listed_and_removed(capsys: Output) -> None:
    """Jupyter finds it with our provisioner and the environment's interpreter, and does not after its removal."""
    assert (
        main(["kernelspec", "install", "--python", sys.executable, "--name", "train", "--display-name", "Train"]) == 0
    )
    assert capsys.readouterr().out.startswith("Installed kernelspec train (Train) in ")
    provisioner = KernelSpecManager().get_kernel_spec("train").metadata["kernel_provisioner"]
    assert provisioner["provisioner_name"] == "warmcell"
    assert provisioner["config"] == {"python": sys.executable}
    assert listed(capsys)["train"]["python"] == sys.executable
    assert main(["kernelspec", "list"]) in {0, 3}
    assert "Train" in capsys.readouterr().out
    assert main(["kernelspec", "remove", "train"]) == 0
    assert capsys.readouterr().out.startswith("Removed ")
    assert "train" not in listed(capsys)


def test_what_kernels_start_with_is_written_down(capsys: Output) -> None:
    """Every option lands in the kernelspec under the provisioner's own name for it."""
    options = ["--preload", "numpy, json", "--template", "t", "--network", "host", "--workspace", "ro"]
    options += ["--home", "persistent", "--gpu", "h100:1,a100:2", "--memory", "8GiB", "--cpus", "1.5"]
    options += ["--mount", "/data", "--mount", "/opt:ro", "--env", "HF_HOME", "--env", "LANGUAGE"]
    assert main(["kernelspec", "install", "--name", "all", *options, "--json"]) == 0
    directory = Path(json.loads(capsys.readouterr().out)["directory"])
    config = json.loads((directory / "kernel.json").read_text())["metadata"]["kernel_provisioner"]["config"]
    assert config == {
        "python": sys.executable,
        "preload": ["numpy", "json"],
        "template": "t",
        "network": "host",
        "workspace": "ro",
        "home": "persistent",
        "gpu": ["H100", "A100:2"],
        "memory": "8GiB",
        "cpus": 1.5,
        "mounts": ["/data", "/opt:ro"],
        "env": ["HF_HOME", "LANGUAGE"],
    }


def test_no_template_is_an_empty_list(capsys: Output) -> None:
    """`--preload none` is how one asks for cold starts."""
    assert main(["kernelspec", "install", "--name", "cold", "--preload", "none"]) == 0
    config = KernelSpecManager().get_kernel_spec("cold").metadata["kernel_provisioner"]["config"]
    assert config["preload"] == []


def test_it_can_be_put_below_a_prefix(places: Places, capsys: Output) -> None:
    """An administrator installs for everybody."""
    prefix = places.root / "everybody"
    assert main(["kernelspec", "install", "--name", "shared", "--prefix", str(prefix)]) == 0
    assert (prefix / "share/jupyter/kernels/shared/kernel.json").is_file()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--python", "/nowhere/python"], "no Python interpreter"),
        (["--name", "no good!"], "name of a kernelspec"),
        (["--gpu", "A100:"], "is no GPU request"),
        (["--memory", "lots"], "amount of memory"),
    ],
)
def test_what_cannot_be_is_refused_with_its_cure(options: list[str], complaint: str, capsys: Output) -> None:
    """One message and one cure, exit code 1, and nothing is written."""
    before = listed(capsys)
    assert main(["kernelspec", "install", *options]) == 1
    said = capsys.readouterr().err
    assert complaint in said
    assert "\n  cure: " in said
    assert listed(capsys) == before


@pytest.mark.parametrize(("name", "complaint"), [("nothing", "no kernelspec"), ("python3", "none of Warmcell's")])
def test_only_ours_are_removed(name: str, complaint: str, places: Places, capsys: Output) -> None:
    """An unknown name and somebody else's kernelspec are refused."""
    theirs = places.root / "jupyter" / "data" / "kernels" / "python3"
    theirs.mkdir(parents=True)
    (theirs / "kernel.json").write_text(json.dumps({"argv": ["python"], "display_name": "P", "language": "python"}))
    assert main(["kernelspec", "remove", name]) == 1
    assert complaint in capsys.readouterr().err
    assert theirs.exists()


def test_an_environment_that_is_gone_is_told_in_the_list(places: Places, capsys: Output) -> None:
    """Exit code 3 and the cure: something should be looked after."""
    assert main(["kernelspec", "install", "--name", "gone"]) == 0
    path = places.root / "jupyter" / "data" / "kernels" / "gone" / "kernel.json"
    path.write_text(path.read_text().replace(json.dumps(sys.executable), '"/nowhere/python"'))
    capsys.readouterr()
    assert main(["kernelspec", "list"]) == 3
    assert "cure: " in capsys.readouterr().out


def test_a_kernelspec_can_name_an_image(capsys: Output) -> None:
    """Instead of an environment of this machine's: it is called as the image, and no interpreter is written down."""
    assert main(["kernelspec", "install", "--image", "analysis", "--memory", "1GiB"]) == 0
    assert capsys.readouterr().out.startswith("Installed kernelspec warmcell-analysis (analysis (Warmcell)) in ")
    provisioner = KernelSpecManager().get_kernel_spec("warmcell-analysis").metadata["kernel_provisioner"]
    assert provisioner["config"] == {"image": "analysis", "memory": "1GiB"}
    shown = listed(capsys)["warmcell-analysis"]
    assert (shown["python"], shown["ok"]) == ("image analysis", True)
    with pytest.raises(SystemExit):
        main(["kernelspec", "install", "--image", "analysis", "--python", sys.executable])
