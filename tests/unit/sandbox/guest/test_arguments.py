"""The line of `%%remote`: what can be written, and what is said about what cannot."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmcell.sandbox.guest.magics.arguments import KEYS, ArgumentError, Arguments, check_known, parse


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", Arguments()),
        ("  gpu=A100 ", Arguments(gpu="A100")),
        ("gpu=H100:2 send=a,b get=c", Arguments(gpu="H100:2", send=("a", "b"), get=("c",))),
        ("gpu='A100 80GB' send='a, b'", Arguments(gpu="A100 80GB", send=("a", "b"))),
        ("send=a,a", Arguments(send=("a",))),
        ("send=größe", Arguments(send=("größe",))),
    ],
)
def test_lines_are_read(line: str, expected: Arguments) -> None:
    """Keys in any order, values in quotes where they have spaces, names once each."""
    assert parse(line) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gpus=A100", "There is no gpus=. Did you mean gpu?"),
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
        ("nonsense=1", "Keys are a GPU, as in gpu=A100"),
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


def test_an_unknown_variable_is_named_with_its_nearest() -> None:
    """A slip in send= is told with the variable that was meant; private ones are not proposed."""
    with pytest.raises(ArgumentError, match=r"no variable dtaa\. Did you mean data\?"):
        check_known(("dtaa",), {"data": 1, "_dtaa": 2})
    check_known(("data",), {"data": 1})


def test_every_key_is_in_the_table_that_help_shows() -> None:
    """`%%remote?` shows the magic's docstring, so it has each key with the examples of the error message."""
    from warmcell.sandbox.guest.magics.remote import Remote

    text = Remote.magic.__doc__ or ""
    for key, meaning in KEYS.items():
        assert f"\n        {key} " in text
        for example in meaning.split("as in ")[1].split(", "):
            assert example in text
