"""Output that waits: in order, bounded, and honest about what is missing."""

import pytest
from jupyter_client.session import Session

from warmcell.sandbox.guest.kernel.iopub import Kept

SESSION = Session(key=b"")


def message(kind: str, text: str, parent: str = "p") -> list[bytes]:
    made = SESSION.msg(kind, {"text": text}, parent={"header": {"msg_id": parent, "msg_type": "execute_request"}})
    return [bytes(frame) for frame in SESSION.serialize(made, ident=kind.encode())]


def sent(kept: Kept) -> list[tuple[str, str, str]]:
    """All that comes out: type, text, parent."""
    found = []
    while kept:
        _, frames = SESSION.feed_identities(kept.first(SESSION))
        read = SESSION.deserialize(frames)
        found.append((read["msg_type"], read["content"]["text"], read["parent_header"]["msg_id"]))
        kept.sent()
    return found


def test_what_was_kept_comes_out_in_order() -> None:
    """Below the bound nothing is missing, and asking twice for the first is asking for the same one."""
    kept = Kept(10_000)
    assert not kept
    for number in range(3):
        kept.add(message("stream", str(number)))
    assert kept.first(SESSION) == kept.first(SESSION)
    assert [text for _, text, _ in sent(kept)] == ["0", "1", "2"]
    assert not kept


def test_past_the_bound_old_output_goes_and_states_stay() -> None:
    """In its place comes a line, for the cell that it belonged to; the rest keeps its order."""
    kept = Kept(20_000)
    kept.add(message("status", "busy"))
    for number in range(10):
        kept.add(message("stream", f"{number}" + "x" * 5000, parent="cell"))
    kept.add(message("status", "idle"))
    kinds = sent(kept)
    assert kinds[0][0] == "stream"
    assert "left out 0 MiB" in kinds[0][1]
    assert kinds[0][2] == "cell"
    assert kinds[1][1] == "busy"
    assert kinds[-1][1] == "idle"
    numbers = [int(text[0]) for kind, text, _ in kinds[1:] if kind == "stream"]
    assert numbers == list(range(numbers[0], 10))
    assert 0 < len(numbers) < 5


def test_room_is_free_again_after_sending() -> None:
    """The bound is on what waits, not on all that ever came."""
    kept = Kept(20_000)
    for _ in range(10):
        for _ in range(3):
            kept.add(message("stream", "x" * 3000))
        assert len(sent(kept)) == 3


@pytest.mark.parametrize("frames", [[b"odd"], [b"<IDS|MSG>"], []])
def test_what_is_no_message_is_kept_too(frames: list[bytes]) -> None:
    """Whatever is published comes out as it was."""
    kept = Kept(10)
    kept.add(frames)
    kept.add([b"x" * 100])
    assert kept.first(SESSION) == frames
