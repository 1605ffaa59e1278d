"""The line of `%%remote`: what can be written, and what is said about what cannot."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmcell.sandbox.guest.magics.arguments import KEYS, ArgumentError, Arguments, check_known, parse
from warmcell.sandbox.guest.magics.function import remote


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", Arguments()),
        ("  gpu=A100 ", Arguments(gpu="A100")),
        ("gpu=H100:2 send=a,b get=c", Arguments(gpu="H100:2", send=("a", "b"), get=("c",))),
        ("gpu='A100 80GB' send='a, b'", Arguments(gpu="A100 80GB", send=("a", "b"))),
        ("send=a,a", Arguments(send=("a",))),
        ("send=größe", Arguments(send=("größe",))),
        ("n=4 gpu=T4 detach", Arguments(gpu="T4", n=4, detach=True)),
        ("gpu=any n=max", Arguments(gpu="any", n=0)),
        ("as=best each=files session=train-2", Arguments(result="best", each="files", session="train-2")),
        ("fork n=8 get=loss timeout=90", Arguments(fork=True, n=8, get=("loss",), timeout_s=90.0)),
        ("timeout=90", Arguments(timeout_s=90.0)),
        ("n=2  # one for each of the board's sockets", Arguments(n=2)),
        ("# nothing", Arguments()),
        ("timeout=1.5h", Arguments(timeout_s=5400.0)),
        ("memory=8GiB image=train", Arguments(memory_bytes=8 * 2**30, image="train")),
        ("memory='512 m'", Arguments(memory_bytes=512 * 2**20)),
    ],
)
def test_lines_are_read(line: str, expected: Arguments) -> None:
    """Keys in any order, values in quotes where they have spaces, names once each."""
    assert parse(line) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gpus=A100", "gpus= is no key. Did you mean gpu?"),
        ("A100", "'A100' is no key=value."),
        ("gpu A100", "'gpu' is no key=value. Did you mean gpu?"),
        ("gpu=", "gpu= has no value"),
        ("gpu=A100 gpu=T4", "gpu= is given twice"),
        ("send=a,,b", "'' is no name of a variable"),
        ("send=a.b", "'a.b' is no name of a variable"),
        ("send=2x", "'2x' is no name of a variable"),
        ("get=for", "'for' is no name of a variable"),
        ("send=__import__('os')", "is no name of a variable"),
        ("gpu='A100", "No closing quotation"),
        ("nonsense=1", "There is gpu=, n=, send="),
        ("n=0", "n=0: ranks are counted from 1 to 32"),
        ("n=-1", "n=-1: ranks are counted"),
        ("n=33", "at most 32"),
        ("n=two", "n=two: ranks are counted"),
        ("n=max", "say which: gpu=any n=max"),
        ("timeout=0", "timeout=0 is no time"),
        ("timeout=soon", "as in timeout=90, timeout=15m"),
        ("memory=8", "memory=8 is no amount of memory"),
        ("memory=0GiB", "memory=0GiB is no amount of memory"),
        ("as=a,b", "as=a,b: one name is needed"),
        ("each=a,b", "each=a,b: one name is needed"),
        ("session=../x", "session=../x: letters, digits"),
        ("fork n=0", "n=0: ranks are counted from 1 to 32"),
        ("fork=2", "fork has no value"),
        ("frok", "Did you mean fork?"),
        ("fork gpu=A100", "gpu= cannot be said with fork: clones have what this kernel has"),
        ("fork send=a", "send= cannot be said with fork: clones have all variables already"),
        ("fork session=a", "session= cannot be said with fork: clones go with their cell"),
        ("fork n=max", "say how many clones, as in fork n=4"),
        ("detach=yes", "detach has no value"),
        ("detach detach", "detach is given twice"),
        ("detatch", "Did you mean detach?"),
        ("sesion=a", "Did you mean session?"),
    ],
)
def test_malformed_lines_are_told_how_to_be_right(line: str, said: str) -> None:
    """The message names what is wrong, and the nearest or all that would be right."""
    with pytest.raises(ArgumentError) as caught:
        parse(line)
    assert said in str(caught.value)


@given(st.text())
def test_no_line_is_evaluated_or_breaks_the_reader(line: str) -> None:
    """Any text is read, or refused with an ArgumentError."""
    try:
        arguments = parse(line)
    except ArgumentError:
        return
    assert all(name.isidentifier() for name in (*arguments.send, *arguments.get))


def test_defaults_are_what_the_line_does_not_say() -> None:
    """What is written wins; what is wrong in a default says where it comes from."""
    assert parse("n=2", {"n": 4, "gpu": "T4", "detach": False}) == Arguments(n=2, gpu="T4")
    assert parse("", {"get": ["a", "b"], "timeout": 60}) == Arguments(get=("a", "b"), timeout_s=60.0)
    assert parse("fork", {"gpu": "T4", "memory": "8GiB", "n": 4}) == Arguments(fork=True, n=4)
    assert parse("gpu=T4", {"fork": True}) == Arguments(gpu="T4")
    with pytest.raises(ArgumentError, match=r"timeot= is no key\. Did you mean timeout\? \(from c\.Warmcell\.remote"):
        parse("", {"timeot": 5})
    with pytest.raises(ArgumentError, match=r"n=x: .*notebook's metadata"):
        parse("gpu=T4", {"n": "x"})


def test_an_unknown_variable_is_named_with_its_nearest() -> None:
    """A slip in send= is told with the variable that was meant; private ones are not proposed."""
    with pytest.raises(ArgumentError, match=r"send=dtaa: there is no variable dtaa\. Did you mean data\?"):
        check_known("send", ("dtaa",), {"data": 1, "_dtaa": 2})
    check_known("each", ("data",), {"data": 1})


def test_every_key_is_in_the_table_that_help_shows() -> None:
    """`%%remote?` shows the magic's docstring, so it has each key with the examples of the error message."""
    from warmcell.sandbox.guest.magics.remote import Remote

    text = Remote.magic.__doc__ or ""
    for key, meaning in KEYS.items():
        assert f"\n{key} " in text
        for example in meaning.partition("as in ")[2].split("; ")[0].split(", "):
            assert example in text


def test_what_is_usual_can_be_left_out() -> None:
    """`none` is none, whether or not anything is usual."""
    usual = {"gpu": "T4", "timeout": "2h", "image": "train", "memory": "8GiB", "n": 2}
    assert parse("gpu=none timeout=none image=none memory=none", usual) == Arguments(n=2) == parse("gpu=none n=2")
    assert parse("gpu=none fork", usual) == Arguments(n=2, timeout_s=7200.0, fork=True)


def test_a_decorator_without_names_is_refused_before_anything_is_sent() -> None:
    """`@remote("A100")` is not a function called A100."""
    with pytest.raises(ArgumentError, match=r"'A100' is no function; .*@warmcell\.remote\(gpu=\"A100\"\)"):
        remote(cast(Any, "A100"))
