"""The program that installs conda's packages: what it tells of where they come from."""

import pytest

from warmcell.sandbox.images.conda_install import Alias


@pytest.mark.parametrize(
    ("address", "said", "told"),
    [
        ("https://a:pw/x@h/c", "a package https://a:pw/x@h/c pw%2Fx", "a package https://***:***@h/c ***"),
        ("https://a:secret@h", "a package of https://a:secret@h", "a package of https://***:***@h"),
        ("https://tok-en@h/c", "tok-en at https://tok-en@h/c", "*** at https://***@h/c"),
        ("https://h/t/tok-en/c", "https://h/t/tok-en/c", "https://h/t/***/c"),
        ("https://h/c", "a package of https://h/c", "a package of https://h/c"),
    ],
)
def test_secrets_are_hidden_and_words_are_not(address: str, said: str, told: str) -> None:
    """A user's name may be a letter, which is in most words."""
    assert Alias(address).hide(said) == told
