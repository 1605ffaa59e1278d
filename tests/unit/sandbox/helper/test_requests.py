"""What a user sends to the root process: a request that is checked, or refused with a reason, in bounded memory."""

import json
import os
import socket
from typing import Any

from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, changed, give_anything
from warmcell.sandbox.helper import wanted as wanting
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.wanted import Wanted, wanted
from warmcell.sandbox.helper.wire import LINE_MAX_BYTES, PIECE_MAX_BYTES, Conversation

TREE = {"name": "image", "fd": 0, "target": "/env", "writable": False}
OVERLAY = {"name": "layer", "lowers": ["image"], "target": "/work", "size_bytes": 5, "mode": 0o755, "skeleton": ["a/b"]}
FILL = {"fd": 1, "path": "layer/upper", "only_top": False, "most_bytes": 9, "most_entries": 9}
LIMITS = {"memory_bytes": 2**30, "pids": 100, "cpus": 1.5, "layer_bytes": 2**30, "shm_bytes": 0}
SANDBOX: dict[str, Any] = {
    **{"id": "a" * 12, "named": "b" * 12, "network": "none", "limits": LIMITS, "python": "/env/bin/python"},
    **{"home": "/home/user", "private_home": True, "trees": [TREE], "overlays": [OVERLAY], "fills": [FILL]},
    **{
        "links": {"/data": "/work/data"},
        "covered": ["/env/secret"],
        "skeleton": [".cache"],
        "mounts": 0,
        "later": True,
    },
}
PLACES = st.sampled_from(
    ("/", "/usr/x", "/run", "/work/../etc", "//a", "/work", "/data/x", "/tmp/x", "../a", "a/..", "a/../../b", "/e\0")
)


def odd(name: str, sound: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The sandbox with such things in one of its lists, some with something odd in them."""
    moved = st.tuples(st.sampled_from(sorted(sound)), PLACES).map(lambda one: {**sound, one[0]: one[1]})
    ones = st.lists(st.one_of(st.just(sound), changed(sound), moved), max_size=3)
    return ones.map(lambda ones: {**SANDBOX, name: ones})


SANDBOXES = st.one_of(
    changed(SANDBOX),
    odd("trees", TREE),
    odd("overlays", OVERLAY),
    odd("fills", FILL),
    changed(LIMITS).map(lambda limits: {**SANDBOX, "limits": limits}),
    st.dictionaries(PLACES, st.one_of(PLACES, JSON), max_size=2).map(lambda links: {**SANDBOX, "links": links}),
    st.tuples(st.sampled_from(("home", "python")), PLACES).map(lambda one: {**SANDBOX, one[0]: one[1]}),
    st.tuples(st.sampled_from(("covered", "skeleton")), PLACES).map(lambda one: {**SANDBOX, one[0]: [one[1]]}),
)


@LENGTHS
def test_any_sandbox_is_as_it_must_be_or_refused(examples: int) -> None:
    """No place of the sandbox's own is anybody's, and all that is shown came as a descriptor."""

    def take(said: dict[str, Any]) -> None:
        made = wanted(said, [70, 71])
        assert isinstance(made, Wanted)
        places = [made.home, *made.links, *made.covered, *(one.target for one in (*made.trees, *made.overlays))]
        for place in places:
            assert place in ("", wanting.GUEST) or (place.startswith("/") and os.path.normpath(place) == place)
            assert not any(place.startswith(f"{own}/") for own in wanting.CLOSED)
        assert {made.mounts, *(one.fd for one in (*made.trees, *made.fills))} <= {70, 71}
        for path in (*made.skeleton, *(one for each in made.overlays for one in each.skeleton)):
            assert os.path.normpath(f"/top/{path}").startswith("/top/")

    give_anything(
        SANDBOXES,
        take,
        refusals=HelperError,
        examples=examples,
        sound=[SANDBOX],
        broken=[{**SANDBOX, "mounts": 2}, {**SANDBOX, "home": "/usr"}, {**SANDBOX, "links": {"/work": "/"}}],
    )


@LENGTHS
def test_any_bytes_are_a_request_or_refused(examples: int) -> None:
    """One line with an object, then pieces of a stream."""

    def take(sent: bytes) -> None:
        theirs, ours = socket.socketpair()
        try:
            theirs.sendall(sent)
            theirs.shutdown(socket.SHUT_WR)
            said = Conversation(ours)
            assert isinstance(said.request, dict)
            for read in (lambda: said.text("op"), lambda: said.number("pid"), said.pidfd, said.answers):
                try:
                    assert read()
                except HelperError as error:
                    assert error.hint
            while said.piece():
                pass
        except EOFError:
            pass
        finally:
            theirs.close()
            ours.close()

    heads = st.one_of(changed({"op": "restore", "pid": 7, "image": "a"}), JSON).map(
        lambda one: json.dumps(one).encode()
    )
    pieces = st.sampled_from(
        (b'{"bytes": 3}\nabc', b'{"bytes": 0}\n', b'{"bytes": -1}\n', b'{"bytes": 1e9}\n', b'{"bytes": 8388608}\na')
    )
    wholes = st.tuples(heads, st.just(b"\n"), st.lists(pieces, max_size=3).map(b"".join)).map(b"".join)
    deep, long = b"[" * 60_000 + b"\n", b" " * (2 * LINE_MAX_BYTES)
    give_anything(
        st.one_of(wholes, st.binary(max_size=60), st.sampled_from((deep, long))),
        take,
        refusals=HelperError,
        examples=examples,
        memory_max=2 * PIECE_MAX_BYTES,
        sound=[b'{"op": "a"}\n{"bytes": 2}\nab{"bytes": 0}\n'],
        broken=[b"[]\n", deep, long, b'{}\n{"bytes": true}\n'],
    )
