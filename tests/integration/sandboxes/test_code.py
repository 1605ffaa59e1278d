"""Code in sandboxes, through the SDK and a real keeper: results, contexts, interrupts."""

import pytest

from warmcell import Sandbox
from warmcell.sandbox import errors

pytestmark = pytest.mark.bubblewrap


def test_code_keeps_its_variables_and_shows_its_results(box: Sandbox) -> None:
    """Values, prints in order as they come, displays, and the error with the user's own traceback."""
    said: list[tuple[str, str]] = []
    box.run("value = 20")
    done = box.run(
        "import sys\nprint('out')\nprint('err', file=sys.stderr)\ndisplay('shown')\nvalue + 1",
        on_stdout=lambda text: said.append(("stdout", text)),
        on_stderr=lambda text: said.append(("stderr", text)),
        on_result=lambda result: said.append(("result", str(result.text))),
    )
    assert (done.text, done.stdout, done.stderr, done.error) == ("21", "out\n", "err\n", None)
    assert [result.text for result in done.results] == ["'shown'", "21"]
    assert ("stdout", "out\n") in said
    assert said[-1] == ("result", "21")
    failed = box.run("1 / 0")
    assert failed.error is not None
    assert failed.error.name == "ZeroDivisionError"
    assert "1 / 0" in str(failed.error)
    assert "\x1b" not in str(failed.error)
    assert box.run("import os; os.environ['SAID']").text == "'to all'"


def test_what_comes_right_after_an_error_runs(box: Sandbox) -> None:
    """A kernel throws away what is sent while it recovers from an error; this one would never have done."""
    box.run("get_ipython().kernel._post_dummy_stop_aborting_message = lambda subshell: None")
    assert box.run("1 / 0").error is not None
    assert box.run("'goes on'").text == "'goes on'"


def test_code_past_its_time_is_interrupted_and_the_next_runs(box: Sandbox) -> None:
    """It is an error of the execution; the kernel and its variables stay."""
    box.run("kept = 'yes'")
    late = box.run("import time\ntime.sleep(60)", timeout=0.3)
    assert late.error is not None
    assert late.error.name == "TimeoutError"
    assert box.run("kept").text == "'yes'"


@pytest.mark.parametrize("where", ["default", "another"])
def test_code_that_exits_ends_its_kernel_and_nothing_else(box: Sandbox, where: str) -> None:
    """The run ends well, and the next one begins anew, whole: none is begun in what is about to end."""
    context = "default" if where == "default" else box.create_context()
    for word in ("exit()", "quit()"):
        box.run("kept = 1", context=context)
        done = box.run(f"print('before')\n{word}", context=context)
        assert (done.stdout, done.error) == ("before\n", None)
        after = box.run("import time; time.sleep(0.3); 'kept' in globals()", context=context)
        assert (after.text, after.error) == ("False", None)
    done = box.run("import sys; sys.exit(3)", context=context)
    assert done.error is not None
    assert done.error.name == "SystemExit"
    assert box.run("'time' in globals()", context=context).text == "True"
    if where == "another":
        box.remove_context(context)


def test_a_kernel_that_dies_is_told_and_the_next_run_has_another(at_home: None) -> None:
    """The end of the kernel is an error with its reason; the sandbox and its files stay."""
    with Sandbox(preload=()) as own:
        own.files.write("kept", "yes")
        with pytest.raises(errors.SandboxDiedError):
            own.run("x = 1\n__import__('os')._exit(3)")
        assert own.run("'x' in globals()").text == "False"
        assert own.files.read("kept") == b"yes"
