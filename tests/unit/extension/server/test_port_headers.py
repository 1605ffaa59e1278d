"""What is kept from a web port of a sandbox, and what it may not say to browsers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.anything import LENGTHS, give_anything
from warmcell.extension.server.ports import handler
from warmcell.extension.server.ports.headers import SANDBOXED, Place, bare_query, from_port, may_cross, moved, to_port

PATH = Place(port=80, scheme="https", host="lab.test", prefix="/u/warmcell/ports/80-x/t")
OWN = Place(port=80, scheme="https", host="80-x.boxes.test")
SECRETS = (
    ["Cookie", "Authorization", "Proxy-Authorization", "X-XSRFToken", "X-API-KEY", "Referer", "X-Forwarded-User"],
    ["Warmcell-Principal", "Warmcell-Ticket", "E2b-Traffic-Access-Token", "X-Access-Token", "Forwarded"],
)


@pytest.mark.parametrize("place", [PATH, OWN])
@pytest.mark.parametrize("name", [name for names in SECRETS for name in names])
def test_no_credential_goes_to_a_port(place: Place, name: str) -> None:
    """In whatever case it is written; what is the port's own business goes."""
    asked = [(name.swapcase(), "secret"), ("X-Their-Own", "theirs"), ("Accept", "*/*")]
    sent = to_port(asked, place)
    assert b"secret" not in [value for _, value in sent]
    assert {(b"X-Their-Own", b"theirs"), (b"Accept", b"*/*"), (b"Host", b"localhost:80")} <= set(sent)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*SECRETS[0], *SECRETS[1], "Connection", "Upgrade", "TE", "Host", "X-A", "Keep-Alive"]),
            st.text(st.characters(max_codepoint=255), max_size=8).map(lambda text: f"secret{text}"),
        )
    )
)
def test_nothing_of_one_hop_goes_on(asked: list[tuple[str, str]]) -> None:
    """Neither those headers, nor those that `Connection` names; of two hosts and connections there is one."""
    sent = to_port([*asked, ("Connection", "X-B , close"), ("X-B", "1")], PATH)
    names = [name.lower() for name, _ in sent]
    assert names.count(b"host") == names.count(b"connection") == 1
    assert not {b"x-b", b"te", b"keep-alive", b"upgrade", b"cookie", b"authorization"} & set(names)


def test_an_answer_sets_nothing_of_the_servers_origin() -> None:
    """Below a path its page is sandboxed; with an origin of its own it is not framed by others."""
    names = ["Set-Cookie", "Clear-Site-Data", "WWW-Authenticate", "Strict-Transport-Security", "Connection"]
    answered = [*((name.encode(), b"x") for name in names), (b"Content-Type", b"text/html")]
    for place, policy in ((PATH, SANDBOXED), (OWN, "frame-ancestors 'self'")):
        shown = from_port(answered, place)
        assert not {name for name, _ in shown} & set(names)
        assert ("Content-Type", "text/html") in shown
        assert ("Content-Security-Policy", policy) in shown
    assert "allow-same-origin" not in SANDBOXED
    crossing = [(b"Access-Control-Allow-Origin", b"https://lab.test")]
    assert ("Access-Control-Allow-Origin", "*") in from_port(crossing, PATH)
    assert ("Access-Control-Allow-Origin", "https://lab.test") in from_port(crossing, OWN)


@pytest.mark.parametrize(
    ("location", "below", "alone"),
    [
        ("/a?b=/c#d", f"{PATH.prefix}/a?b=/c#d", "/a?b=/c#d"),
        ("http://localhost:80/a", f"{PATH.prefix}/a", "/a"),
        ("http://127.0.0.1:80/a", f"{PATH.prefix}/a", "/a"),
        ("https://elsewhere.test/a", "https://elsewhere.test/a", "https://elsewhere.test/a"),
        ("a/b", "a/b", "a/b"),
        (f"{PATH.prefix}/a", f"{PATH.prefix}/a", f"{PATH.prefix}/a"),
        ("http://localhost:80//elsewhere.test/a", f"{PATH.prefix}/elsewhere.test/a", "/elsewhere.test/a"),
    ],
)
def test_redirects_stay_where_the_port_is_shown(location: str, below: str, alone: str) -> None:
    """Whether it knows its prefix or not; those to elsewhere go there."""
    assert (moved(location, PATH), moved(location, OWN)) == (below, alone)


HEADERS = st.sampled_from([b"Location", b"content-location", b"Set-Cookie", b"X-A", b"Connection", b""])
PARTS = st.sampled_from(
    ["http", "://", "//", "[", "]", "localhost:80", "@", ":", "/", "?", "#", "\\", "\xff", PATH.prefix]
)
VALUES = st.one_of(
    st.binary(max_size=20), st.lists(PARTS, max_size=6).map(lambda some: "".join(some).encode("latin-1"))
)


@LENGTHS
def test_whatever_an_answer_says_is_passed_on_or_left_out(examples: int) -> None:
    """No header of it breaks the answer, and none leads below another path of the server than its own."""

    def read(drawn: tuple[Place, list[tuple[bytes, bytes]]]) -> None:
        place, answered = drawn
        for name, value in from_port(answered, place):
            assert name.lower() not in ("set-cookie", "connection")
            if name.lower() == "location" and value.startswith("/") and not value.startswith("//"):
                assert value.startswith(place.prefix)

    inputs = st.tuples(st.sampled_from([PATH, OWN]), st.lists(st.tuples(HEADERS, VALUES), max_size=4))
    give_anything(inputs, read, refusals=(), examples=examples, sound=[(PATH, [(b"Location", b"http://[")])])


def test_a_query_loses_the_servers_credentials_alone() -> None:
    """Everything else is as it was, however it is written."""
    assert (
        bare_query("a=1&token=s%33cret&_xsrf=1&token=mine&%74oken=wct_1&b=%20&&c", "s3cret")
        == "a=1&token=mine&b=%20&&c"
    )


@pytest.mark.parametrize(
    ("headers", "may"),
    [
        ({}, True),
        ({"Origin": "https://80-x.boxes.test"}, True),
        ({"Origin": "https://81-x.boxes.test"}, False),
        ({"Origin": "null"}, False),
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, True),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, False),
    ],
)
def test_cookies_count_for_pages_of_their_own_origin(headers: dict[str, str], may: bool) -> None:
    """A neighbour's page is of the same site, so that `SameSite` keeps it from nothing."""
    assert may_cross(headers, OWN) is may


@pytest.mark.parametrize("base", ["", "/user/ann"])
@pytest.mark.parametrize("below", [None, "/", "/a//b%2F", "/9-other/their-ticket/x", "/warmcell/ports/9-other/theirs/"])
def test_a_path_names_one_port_whatever_comes_after_it(base: str, below: str | None) -> None:
    """An app's own paths may look like those of ports."""
    match = handler.PATH.fullmatch(f"{base}/warmcell/ports/80-x1/aZ_-.9{below or ''}")
    assert match is not None
    assert match.groups() == (f"{base}/warmcell/ports", "80", "x1", "aZ_-.9", below)
