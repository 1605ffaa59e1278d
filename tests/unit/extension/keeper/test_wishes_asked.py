"""What code in sandboxes asks the keeper for, and whom a request is of: understood or refused, whatever it says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

from hypothesis import strategies as st
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine

from tests.anything import LENGTHS, changed, give_anything
from warmcell.extension.keeper import self_api
from warmcell.extension.keeper.gate import HEADER, TICKET, TOKEN_HEADER, Gate
from warmcell.extension.keeper.http import json_object
from warmcell.extension.keeper.principals import TOKEN_PREFIX, Principals
from warmcell.extension.keeper.quotas import PrincipalQuotas
from warmcell.extension.keeper.ranks import RANKS_MAX
from warmcell.extension.keeper.run_handler import Cell
from warmcell.extension.keeper.tickets import Tickets
from warmcell.sandbox.errors import InvalidRequestError, UnauthenticatedError
from warmcell.sandbox.service import SandboxService

CELL: Final[dict[str, Any]] = {
    **{"code": "x", "rank": 1, "ranks": 4, "send": 5, "load": {"buffers": [["values-1", 0, 8]], "tags": ["a"]}},
    **{"get": ["x"], "last": "y", "timeout_s": 60.0},
}
ASKED: Final = RequestStartLine("GET", "/warmcell/api/v1/sandboxes", "HTTP/1.1")
WISH: Final[dict[str, Any]] = {"token": "0" * 16, "n": 3, "name": "here", "gpu": ["A100", "any"], "cell": "m"}


@LENGTHS
def test_any_head_of_a_cell_is_one_or_is_refused(examples: int) -> None:
    """As the first line of a request to run it, from a sandbox or from a process of the user's."""

    def take(head: bytes) -> None:
        cell = Cell.from_json(json_object(head))
        assert 0 <= cell.rank.number < cell.rank.of <= RANKS_MAX
        assert cell.send_bytes >= 0
        assert cell.timeout_s is None or 0 < cell.timeout_s < float("inf")
        assert all(name.isidentifier() for name in (*cell.request.get, cell.request.last or "x"))
        json.dumps(cell.request.load, allow_nan=False)

    heads = st.one_of(changed(CELL).map(lambda one: json.dumps(one).encode()), st.binary(max_size=60))
    give_anything(
        heads,
        take,
        refusals=InvalidRequestError,
        examples=examples,
        sound=[json.dumps(CELL).encode(), b'{"code": ""}'],
        broken=[b"{}", b'{"code": "", "send": 5}', b'{"code": "", "timeout_s": 1e999}', b"[" * 50_000],
    )


@LENGTHS
def test_any_wish_of_a_kernel_is_one_or_is_refused(examples: int) -> None:
    """A token of its answer that no other file's name is made of, a count within bounds, a name, a GPU."""
    reads: dict[str, Callable[[Any], object]] = {
        "token": self_api._token,
        "n": self_api._count,
        "name": self_api._name,
        "gpu": self_api.gpu_wish,
        "cell": self_api._cell,
    }

    def take(drawn: tuple[str, dict[str, Any]]) -> None:
        name, body = drawn
        made = reads[name](body.get(name))
        assert name != "token" or (isinstance(made, str) and made.isalnum())
        assert name != "n" or (isinstance(made, int) and 1 <= made <= self_api.CLONES_MAX)
        assert name != "name" or (isinstance(made, str) and made.isprintable())

    give_anything(
        st.tuples(st.sampled_from(sorted(reads)), changed(WISH)),
        take,
        refusals=InvalidRequestError,
        examples=examples,
        sound=[(name, WISH) for name in reads],
        broken=[(name, {name: 7 if name == "token" else []}) for name in reads],
    )


@LENGTHS
def test_anybody_is_somebody_or_refused(examples: int, tmp_path: Path) -> None:
    """By whatever is in the headers of a request: nobody passes for a principal whose token is not there."""
    principals = Principals(tmp_path / "principals.json")
    info, token = principals.create("ann", scopes=["read"])
    gate = Gate(
        principals,
        cast(PrincipalQuotas, None),
        cast(SandboxService, None),
        Tickets(tmp_path / "key", principals),
    )
    some = st.sampled_from(
        (token, token[:-1], info.id, "ann", "bob", "self", TOKEN_PREFIX, f"{TOKEN_PREFIX}{info.id}_", "")
    )
    texts = st.one_of(some, st.text(st.characters(codec="latin-1"), max_size=40))
    shown = st.tuples(st.sampled_from(("Bearer", "bearer", "token", "Basic", "")), texts).map(" ".join)
    inputs = st.dictionaries(st.sampled_from((HEADER, TOKEN_HEADER, TICKET)), texts, max_size=2)

    def take(drawn: tuple[dict[str, str], str]) -> None:
        headers, authorization = drawn
        request = HTTPServerRequest(
            start_line=ASKED, headers=HTTPHeaders({**headers, "Host": "k", "Authorization": authorization})
        )
        who = gate.who(request)
        kind, _, said = authorization.partition(" ")
        if TICKET not in headers and kind.lower() in ("bearer", "token") and said.strip().startswith(TOKEN_PREFIX):
            assert said.strip() == token
            assert who is not None
            assert (who.name, who.scopes) == ("ann", {"read"})
        assert who is None or gate.ends(request)

    give_anything(
        st.tuples(inputs, st.one_of(shown, texts)),
        take,
        refusals=(UnauthenticatedError, InvalidRequestError),
        examples=examples,
        sound=[({}, f"Bearer {token}"), ({HEADER: "ann", TOKEN_HEADER: info.id}, ""), ({}, "")],
        broken=[
            ({}, f"Bearer {token}x"),
            ({HEADER: "self"}, ""),
            ({TICKET: ""}, ""),
            ({HEADER: "a", TOKEN_HEADER: ""}, ""),
        ],
    )
