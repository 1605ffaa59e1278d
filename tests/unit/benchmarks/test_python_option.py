"""`python -m benchmarks --python`: whose kernels are measured, and what is refused before anything is."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.__main__ import main
from benchmarks.server import OURS, PLAIN, BenchmarkError, JupyterServer
from tests.leaks import own_places


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """An environment that has nothing."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    return str(tmp_path / "bare" / "bin" / "python")


def test_a_result_names_the_packages_of_that_environment(bare: str) -> None:
    """Those of whoever measures say nothing of it."""
    assert machine.packages(sys.executable)[1]["torch"].startswith("2.")
    with pytest.raises(BenchmarkError, match=f"{bare} -m pip install ipykernel numpy pandas torch"):
        machine.packages(bare)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--python", sys.executable, "--only", "P1", "P5"],
            "does not go with P5: choose from P1, P2, P3, P4, P8, P11",
        ),
        (["--python", sys.executable, "--sweep"], "not with --sweep"),
        (["--python", "/nowhere/python"], "/nowhere/python is no interpreter that runs"),
    ],
)
def test_what_cannot_be_is_refused_at_once(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With status 2, as any wrong argument."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


async def test_both_kernelspecs_have_that_interpreter(bare: str) -> None:
    """Jupyter would rather take those of its own environment, which have the same names."""
    with own_places() as places:
        async with JupyterServer(places, python=bare) as server:
            found = (await server.http.get("/api/kernelspecs")).json()["kernelspecs"]
    assert found[PLAIN]["spec"]["argv"][0] == bare
    assert found[OURS]["spec"]["metadata"]["kernel_provisioner"]["config"] == {"python": bare}
