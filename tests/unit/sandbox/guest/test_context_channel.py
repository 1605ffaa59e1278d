"""Messages between a kernel and its contexts: whole, whoever sends them, and bounded in what is kept of half ones."""

import os
import threading

from warmcell.sandbox.guest.kernel.context_channel import PIECE_BYTES, SENDERS_MAX, Channel


def test_messages_come_whole_from_threads_and_children() -> None:
    """Of any size and number of frames, in each sender's order, though many pieces of others come in between."""
    own, its = Channel.pair()
    here, there = Channel(own), Channel(its)
    sizes = (0, 1, PIECE_BYTES - 10, PIECE_BYTES + 1, 5 * PIECE_BYTES)

    def send(who: int) -> None:
        for number, size in enumerate(sizes):
            there.send([bytes((who, number)), b"", bytes((who,)) * size])

    child = os.fork()
    if not child:
        send(9)
        os._exit(0)
    threads = [threading.Thread(target=send, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    heard: dict[int, list[int]] = {}
    for _ in range(len(sizes) * (len(threads) + 1)):
        message = here.receive()
        assert message is not None
        (who, number), empty, data = message
        assert (empty, data) == (b"", bytes((who,)) * sizes[number])
        heard.setdefault(who, []).append(number)
    assert heard == {who: list(range(len(sizes))) for who in (0, 1, 2, 3, 9)}
    for thread in threads:
        thread.join()
    os.waitpid(child, 0)
    there.close()
    assert here.receive() is None
    here.close()


def test_halves_of_messages_are_not_kept_for_ever() -> None:
    """Those of senders that were killed in the middle of one go when there are too many."""
    own, its = Channel.pair()
    here, there = Channel(own), Channel(its)
    for who in range(3 * SENDERS_MAX):
        its.send(who.to_bytes(4, "little") + b"\0" + b"x")
    there.send([b"whole"])
    assert here.receive() == [b"whole"]
    assert len(here._parts) <= SENDERS_MAX
    here.close()
    there.close()
