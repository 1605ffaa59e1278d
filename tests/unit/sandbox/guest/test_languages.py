"""Interpreters of other languages, asked as a context asks them: with bash, which is everywhere."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from warmcell.sandbox.guest.languages import Interpreter, LanguageError, _Answer


@pytest.fixture
def bash() -> Iterator[Interpreter]:
    """One, which is ended afterwards."""
    made = Interpreter("bash")
    yield made
    made.end()


def test_variables_stay_and_output_comes(bash: Interpreter, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole, in the order of the code, with bytes that are no ASCII."""
    assert bash.run("x='ä€'; cd /") == []
    assert bash.run("echo $x $PWD; printf '%200000s' . >&2") == []
    said = capsys.readouterr()
    assert said.out == "ä€ /\n"
    assert len(said.err) == 200_000


@pytest.mark.parametrize("leaves", ["break", "continue", "break 9", "set -u; continue 2"])
def test_a_loop_that_is_not_there_is_not_left(
    bash: Interpreter, capfd: pytest.CaptureFixture[str], leaves: str
) -> None:
    """What follows is left out, and the interpreter goes on with all it has."""
    for _ in range(2):
        with pytest.raises(LanguageError, match="exit status 1"):
            bash.run(f"x=1; for n in 1 2; do break; done; {leaves}; x=2")
        assert "in a loop only" in capfd.readouterr().err
    assert bash.run("[ $x = 1 ]") == []


def test_what_code_traces_is_its_own(bash: Interpreter, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of what the driver does for itself."""
    bash.run("set -x")
    bash.run("true")
    err = capsys.readouterr().err
    assert "+ true" in err
    assert "__warmcell" not in err


def test_it_runs_where_kernels_of_a_shared_template_do() -> None:
    """Which are refused some calls more. What cannot be started leaves nothing."""
    code = (
        "import os, sys, threading\n"
        "from warmcell.sandbox.backends import seccomp\n"
        "from warmcell.sandbox.backends.stage.linux import libc, load_filter\n"
        "from warmcell.sandbox.guest.languages import Interpreter\n"
        "libc.prctl(38, 1, 0, 0, 0)\n"
        "load_filter(seccomp.template())\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        "made = Interpreter('bash')\n"
        "made.run('echo it runs')\n"
        "print(made.end(), len(os.listdir('/proc/self/fd')) - before)\n"
        "def refused(*_): raise RuntimeError('no thread')\n"
        "threading.Thread.start = refused\n"
        "try: Interpreter('bash')\n"
        "except RuntimeError as error: print(error, len(os.listdir('/proc/self/fd')) - before)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout == "it runs\n0 0\nno thread 0\n", ran.stderr


def test_code_of_any_length_is_taken(bash: Interpreter, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer than a pipe, while the one before still prints."""
    bash.run("(for i in $(seq 20000); do echo $i; done) &")
    bash.run("y=" + "a" * 300_000)
    bash.run("wait; echo ${#y}")
    assert capsys.readouterr().out.endswith("300000\n")


def test_variables_of_the_environment_come_and_go(
    bash: Interpreter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What code has set itself is left alone."""
    bash.run("export PATH=$PATH:/mine")
    with monkeypatch.context() as once:
        once.setenv("ONCE", "a b")
        bash.run("echo [$ONCE]")
    bash.run("echo [$ONCE] ${PATH##*:}")
    assert capsys.readouterr().out == "[a b]\n[] /mine\n"


def test_its_end_is_seen_although_others_have_its_pipes(bash: Interpreter, capsys: pytest.CaptureFixture[str]) -> None:
    """A process in the background does not hold it up."""
    before = time.monotonic()
    with pytest.raises(EOFError):
        bash.run("sleep 30 & echo $!; exit 3")
    assert time.monotonic() - before < 10
    assert bash._process.wait(5) == 3
    os.kill(int(capsys.readouterr().out), signal.SIGKILL)


def test_code_has_none_of_its_descriptors(bash: Interpreter, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does each piece of code leave one open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(bash._process.pid, resource.RLIMIT_NOFILE, (210, hard))
    for _ in range(300):
        bash.run("true")
    bash.run("readlink /proc/$BASHPID/fd/198 || echo none")
    assert capsys.readouterr().out == "none\n"


def test_what_code_traces_and_defines_is_its_own(bash: Interpreter, capsys: pytest.CaptureFixture[str]) -> None:
    """`set -x` tells nothing of the environment, and a function of a builtin's name does not come in between."""
    bash.run("set -x; printf() { echo mine; }; export() { echo mine; }")
    bash.run("printf")
    said = capsys.readouterr()
    assert said.out == "mine\n"
    assert "HOME" not in said.err
    with pytest.raises(LanguageError, match="exit status 1"):
        bash.run("false")
    with pytest.raises(LanguageError, match="NUL"):
        bash.run("echo \0")


def test_an_interrupt_ends_the_code_and_not_the_interpreter() -> None:
    """As a context is interrupted: by a signal to its whole group."""
    code = (
        "import os, signal, sys, threading\n"
        "from warmcell.sandbox.guest.languages import Interpreter\n"
        "os.setpgid(0, 0)\n"
        "bash = Interpreter('bash')\n"
        "bash.run('x=4')\n"
        "threading.Timer(0.5, lambda: os.killpg(0, signal.SIGINT)).start()\n"
        "try:\n"
        "    bash.run('sleep 60')\n"
        "except KeyboardInterrupt:\n"
        "    bash.run('echo $x')\n"
        "bash.end()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "4\n", done


@pytest.mark.parametrize("times", [1, 2])
def test_who_does_not_care_for_an_interrupt_is_ended(times: int) -> None:
    """Although it prints on and on; a second interrupt waits no longer. What it says later is nobody's answer."""
    code = (
        "import os, signal, sys, threading\n"
        "from warmcell.sandbox.guest import languages\n"
        "os.setpgid(0, 0)\n"
        "languages.run('bash', 'true')\n"  # It imports IPython, which may take longer than until the first interrupt.
        f"languages.INTERRUPT_S = {[1, 60][times - 1]}\n"
        "interrupt = lambda: os.killpg(0, signal.SIGINT)\n"
        f"for at in range({times}): threading.Timer(1 + at, interrupt).start()\n"
        "try:\n"
        "    languages.run('bash', 'trap \"\" INT; for n in $(seq 300); do echo on; sleep 0.05; done')\n"
        "except languages.LanguageError as error:\n"
        "    print(type(error).__name__)\n"
        "languages.run('bash', 'echo $((6 * 7))')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=12)
    assert done.stdout.splitlines()[-2:] == ["InterpreterEnded", "42"], done


def test_half_a_character_does_not_cost_the_variables(bash: Interpreter, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused, and nothing has ended."""
    bash.run("x=1")
    with pytest.raises(LanguageError, match="surrogate"):
        bash.run("echo \ud800")
    bash.run("echo $x")
    assert capsys.readouterr().out == "1\n"


def test_answers_come_in_any_pieces() -> None:
    """A byte at a time; what is none is told."""
    answer = _Answer()
    data = "3\n2\nok\n0\n3\n€".encode().replace(b"ok\n", b"ok")
    whole = [answer.feed(data[at : at + 1]) for at in range(len(data))]
    assert whole == [False] * (len(data) - 1) + [True]
    assert answer.texts == ["ok", "", "€"]
    with pytest.raises(ValueError, match="invalid literal"):
        _Answer().feed(b"mine\n")
    with pytest.raises(EOFError):
        _Answer().feed(b"")
