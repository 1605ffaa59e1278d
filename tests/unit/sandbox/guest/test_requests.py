"""What all ranks need, from what each of them is to have."""

import pytest

from warmcell.sandbox.guest.magics import requests


@pytest.mark.parametrize(
    ("gpu", "ranks", "wanted"),
    [
        (None, 4, None),
        ("A100", 1, "A100"),
        ("A100", 4, "A100:4"),
        ("H100:2", 3, "H100:6"),
        ("RTX 4090, A100-80GB :2", 2, ["RTX 4090:2", "A100-80GB:4"]),
        ("A100/2", 1, "A100/2"),
        ("A100/2", 2, "A100:1"),
        ("A100/2,24GiB", 3, ["A100:2", "24GiB:3"]),
    ],
)
def test_each_alternative_is_multiplied(gpu: str | None, ranks: int, wanted: object) -> None:
    """Counts by the ranks; who has a share of a GPU has whole ones together with others."""
    assert requests.of(gpu, ranks) == wanted


def test_as_many_as_are_free_are_fallbacks_of_one_request() -> None:
    """The most first; as many alternatives as a request may have, the least among them."""
    (pair,) = requests.each("H100:2")
    assert pair.ranks_on(7) == 3
    assert pair.down_from(3) == ["H100:6", "H100:4", "H100:2"]
    (share,) = requests.each("A100/2")
    assert (share.ranks_on(3), share.down_from(4)) == (6, ["A100:2", "A100:1", "A100/2"])
    many = requests.each("T4")[0].down_from(32)
    assert (len(many), many[0], many[-1]) == (16, "T4:32", "T4")
