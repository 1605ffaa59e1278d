"""Tokens of single sandboxes and signatures: each opens one sandbox, for one purpose, and nothing else."""

import base64
import hashlib
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.anything import LENGTHS, give_anything
from warmcell.extension.server.e2b.keys import DIGESTS_MAX, Holder, Keys, SignedUrl
from warmcell.sandbox.errors import UnauthenticatedError

KEYS = Keys(b"k" * 32)


def test_a_token_opens_its_own_sandbox_and_says_whose_it_is() -> None:
    """For the user's own and for principals'."""
    given = Keys(KEYS.secret, token_id="0123abcd")
    assert KEYS.whose(KEYS.token("one", None), "one", "envd") == Holder(None)
    assert KEYS.whose(KEYS.token("one", "ann"), "one", "envd") == Holder("ann")
    assert KEYS.whose(given.token("one", "ann"), "one", "envd") == Holder("ann", "0123abcd")
    assert KEYS.whose(given.token("one", None), "one", "envd") == Holder(None)
    assert Holder("ann", "0123abcd").headers() == {"Warmcell-Principal": "ann", "Warmcell-Token": "0123abcd"}
    assert Holder(None).headers() == {}


def test_what_is_noted_of_a_gateway_only_the_servers_key_makes() -> None:
    """For one sandbox, one token of a principal's, and one of the gateway's."""
    noted = KEYS.gateway("one", "0123abcd", "shown")
    assert noted.startswith("0123abcd:")
    assert "shown" not in noted
    others = {
        Keys(b"x" * 32).gateway("one", "0123abcd", "shown"),
        KEYS.gateway("two", "0123abcd", "shown"),
        KEYS.gateway("one", "0123abcd", "other"),
        f"0123abcd:{hashlib.sha256(b'shown').hexdigest()}",
    }
    assert noted not in others
    # Who leaves the token out has not its digest.
    assert noted.partition(":")[2] != KEYS.gateway("one", "", "shown").partition(":")[2]


@pytest.mark.parametrize(
    "token",
    [
        KEYS.token("two", "ann"),
        KEYS.token("one", "ann", "traffic"),
        Keys(b"x" * 32).token("one", "ann"),
        KEYS.token("one", "ann").replace(
            KEYS.token("", "ann").partition(".")[0], KEYS.token("", "bob").partition(".")[0]
        ),
        KEYS.token("one", "ann")[:-1],
        Keys(KEYS.secret, token_id="0123abcd").token("one", "ann").replace("0123abcd", "0123abce"),
        Keys(KEYS.secret, token_id="0123abcd").token("one", "ann").replace(".0123abcd", ""),
        KEYS.token("one", "ann\0" + "0123abcd"),
        KEYS.token("one", "ann").replace(".", "..", 1),
        "",
        "wcs_",
        "wcs_!.x",
    ],
)
def test_no_other_token_opens_it(token: str) -> None:
    """Another sandbox's, another purpose's, another key's, one whose name was changed, half of one."""
    with pytest.raises(UnauthenticatedError):
        KEYS.whose(token, "one", "envd")


@LENGTHS
def test_no_text_opens_a_sandbox(examples: int) -> None:
    """Whatever is sent is refused, by type: parts of a token that opens it, too."""
    good = KEYS.token("one", "ann")
    part = st.sampled_from((good, *good.split("."), "wcs_", ".", "..", "0123abcd")) | st.text(max_size=20)

    def refused(token: str) -> None:
        if token != good:
            with pytest.raises(UnauthenticatedError):
                KEYS.whose(token, "one", "envd", "traffic")

    give_anything(
        st.text(max_size=60) | st.lists(part, max_size=4).map("".join), refused, refusals=(), examples=examples
    )


def test_the_signature_is_the_one_that_clients_make() -> None:
    """Of path, operation, user, token and time, in E2B's order and alphabet."""
    signed = SignedUrl(path="a b", operation="read", expires_at=100)
    raw = f"a b:read::{KEYS.token('one', None)}:100".encode()
    expected = "v1_" + base64.b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()
    assert KEYS.signature("one", None, signed) == expected
    assert KEYS.signature("one", None, SignedUrl(path="a b", operation="write", expires_at=100)) != expected


def test_a_signature_is_known_by_whose_token_it_was_made_with() -> None:
    """Of all those that may have; nobody's is nobody's."""
    signed = SignedUrl(path="a", operation="read")
    made = Keys(KEYS.secret, token_id="0123abcd").signature("one", "ann", signed)
    holders = [("one", Holder("ann", token_id)) for token_id in ("", "ffffffff", "0123abcd")]
    assert KEYS.signer(holders, signed, made) == ("one", Holder("ann", "0123abcd"))
    assert KEYS.signer(holders[:2], signed, made) is None
    assert KEYS.signer([("two", holder) for _, holder in holders], signed, made) is None


def test_only_so_many_digests_are_made_for_a_stranger() -> None:
    """Nor any for what is no signature, or of a path that is none."""
    tried: list[str] = []

    def boxes() -> Iterator[tuple[str, Holder]]:
        for number in itertools.count():
            tried.append(str(number))
            yield str(number), Holder("ann")

    signed = SignedUrl(path="a", operation="read")
    with pytest.raises(UnauthenticatedError, match="too many") as raised:
        KEYS.signer(boxes(), signed, KEYS.signature("other", "ann", signed))
    assert raised.value.hint
    assert len(tried) == DIGESTS_MAX + 1
    for odd, signature in (
        (signed, "v1_ä"),
        (signed, ""),
        (SignedUrl(path="a" * 5000, operation="read"), "v1_" + "a" * 43),
    ):
        assert KEYS.signer(boxes(), odd, signature) is None
    assert len(tried) == DIGESTS_MAX + 1


def test_signed_urls_end() -> None:
    """By the server's clock; without a time they do not."""
    SignedUrl(path="a", operation="read").check_time()
    SignedUrl(path="a", operation="read", expires_at=int(time.time()) + 60).check_time()
    with pytest.raises(UnauthenticatedError, match="signature is already expired"):
        SignedUrl(path="a", operation="read", expires_at=int(time.time()) - 2).check_time()


def test_whoever_is_first_makes_the_key(tmp_path: Path) -> None:
    """Eight at once have one key, which nobody else may read; a damaged one is an error, not a new one."""
    path = tmp_path / "state" / "e2b.key"
    found: list[Keys] = []
    threads = [threading.Thread(target=lambda: found.append(Keys.load(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["e2b.key"]
    path.write_bytes(b"short")
    with pytest.raises(OSError, match="damaged"):
        Keys.load(path)
