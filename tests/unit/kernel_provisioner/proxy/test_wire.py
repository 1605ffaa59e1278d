"""Messages: frames and signatures are those of jupyter_client."""

import json

import pytest
from jupyter_client.session import Session

from warmcell.kernel_provisioner.proxy import wire
from warmcell.kernel_provisioner.proxy.wire import Author, MalformedMessageError, Signer, parse

KEY = b"secret"


def frames(kind: str = "execute_request", **content: object) -> list[bytes]:
    """A message as jupyter_client puts it on the wire."""
    session = Session(key=KEY)
    found: list[bytes] = [b"client", *session.serialize(session.msg(kind, content))]
    return found


def test_jupyters_signatures_are_ours() -> None:
    """What a Session signs is accepted, and what is signed here a Session accepts."""
    message = parse(frames())
    signer = Signer(KEY, "hmac-sha256")
    assert signer.sign(message.signed) == message.signature
    assert signer.accepts(message)
    _, own = Author().make("status", {"execution_state": "idle"})
    sent = own.frames(signer.sign(own.signed))
    read = Session(key=KEY).deserialize(sent[1:])
    assert read["content"] == {"execution_state": "idle"}


@pytest.mark.parametrize("place", range(3, 7))
def test_a_message_that_was_changed_is_not_accepted(place: int) -> None:
    """Header, parent, metadata and content are all covered."""
    changed = frames()
    changed[place] = changed[place] + b" "
    assert not Signer(KEY, "hmac-sha256").accepts(parse(changed))


def test_another_key_and_no_signature_are_not_accepted() -> None:
    """Only who has the key may speak."""
    assert not Signer(b"other", "hmac-sha256").accepts(parse(frames()))
    unsigned = frames()
    unsigned[2] = b""
    assert not Signer(KEY, "hmac-sha256").accepts(parse(unsigned))


def test_a_message_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has heard a signed message cannot send it again, within a long memory that is bounded."""
    monkeypatch.setattr(wire, "HISTORY", 50)
    signer = Signer(KEY, "hmac-sha256")
    once = parse(frames())
    assert signer.accepts(once)
    assert not signer.accepts(once)
    session = Session(key=KEY)
    for _ in range(60):
        signer.accepts(parse([b"client", *session.serialize(session.msg("kernel_info_request"))]))
    assert len(signer._seen) == len(signer._order) == 50


def test_an_empty_key_signs_nothing_and_takes_everything() -> None:
    """As jupyter_client does it: the guest's side."""
    signer = Signer(b"", "hmac-sha256")
    message = parse(frames())
    assert signer.sign(message.signed) == b""
    assert signer.accepts(message)
    assert signer.accepts(message)


@pytest.mark.parametrize(
    "said", [[b"client"], [b"<IDS|MSG>", b"", b"{}", b"{}", b"{}"], [b"a", b"b", b"c", b"d", b"e", b"f", b"g"]]
)
def test_frames_that_are_no_message_are_refused(said: list[bytes]) -> None:
    """Neither too few frames nor a missing delimiter gets through."""
    with pytest.raises(MalformedMessageError):
        parse(said)


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"{}", b'{"msg_type": 1, "msg_id": "x"}', b"[" * 100_000])
def test_a_broken_header_is_one_kind_of_error(header: bytes) -> None:
    """Whatever stands in a header, reading it raises nothing else."""
    said = frames()
    said[3] = header
    with pytest.raises(MalformedMessageError):
        parse(said).read_header()


def test_buffers_and_route_survive() -> None:
    """What is not looked at is passed on as it is."""
    said = [b"a", b"b", *frames()[1:], b"buffer", b""]
    assert parse(said).frames(said[3]) == said


def test_an_author_knows_its_own() -> None:
    """Ids of the proxy's own messages are new each time, and told from others'."""
    author = Author()
    (first, message), (second, _) = author.request("kernel_info_request"), author.request("kernel_info_request")
    assert first != second
    assert author.owns(first)
    assert not author.owns(json.loads(frames()[3])["msg_id"])
    assert message.route == [author.route]
