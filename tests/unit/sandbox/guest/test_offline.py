"""pip without network: which commands are meant, and what of their output is told."""

import sys

import pytest

from warmcell.sandbox.guest.kernel import offline


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        ("pip install x", True),
        ("/env/bin/python -m pip install -U x", True),
        ("pip3.11 --no-cache-dir install x", True),
        ("cd /tmp && pip wheel .", True),
        ("pip list", False),
        ("pip --version", False),
        ("echo pipeline install", False),
        ("make install", False),
    ],
)
def test_only_pip_that_fetches_is_meant(command: str, meant: bool) -> None:
    """`install`, `download` and `wheel` of any pip, and nothing else."""
    assert bool(offline.PIP.search(command)) is meant


def script(code: str) -> str:
    return f"{sys.executable} -c '{code}'"


def test_complaints_about_the_network_become_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    """pip's own lines are dropped, the others shown, and the error says the cure."""
    command = script('print("Processing"); print("ERROR: No matching distribution found for x"); raise SystemExit(1)')
    with pytest.raises(Exception, match="no network") as caught:
        offline._pip(command)
    assert type(caught.value).__name__ == "UsageError"
    assert "Network: Open" in str(caught.value)
    assert capsys.readouterr().out == "Processing\n"


def test_other_failures_and_success_are_left_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is passed on; a complaint of a command that succeeds is no error."""
    assert offline._pip(script('print("no such option"); raise SystemExit(2)')) == 2
    assert offline._pip(script('print("WARNING: Retrying (Retry(total=0"); print("done")')) == 0
    assert capsys.readouterr().out == "no such option\ndone\n"


def test_pip_does_not_try_again_and_does_not_isolate_builds(capsys: pytest.CaptureFixture[str]) -> None:
    """What pip reads from the environment spares five retries, and lets a folder be built without an index."""
    offline._pip(script('import os; print(os.environ["PIP_RETRIES"], os.environ["PIP_NO_BUILD_ISOLATION"])'))
    assert capsys.readouterr().out == "0 0\n"
