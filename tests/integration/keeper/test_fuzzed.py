"""Requests that schemathesis makes from the committed OpenAPI document, sound and unsound, at a real keeper.

Each is sent three times: for a principal whose sandbox it is about, for another one, and for the latter about a sandbox
that nobody has. The answers to the last two are the same, whatever is asked.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, Final

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.lanes import TOP
from tests.leaks import Places, own_places
from warmcell.sandbox.client.keeper import SyncKeeperClient

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

pytestmark = pytest.mark.bubblewrap

API = "/warmcell/api/v1"
DOCUMENT = json.loads((TOP / "docs" / "reference" / "openapi.json").read_text())
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
CHECKS = [status_code_conformance, content_type_conformance, response_headers_conformance, response_schema_conformance]
OURS: Final = (HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.INSUFFICIENT_STORAGE)
"""Refusals of ours that say what this machine lacks, with a hint."""

ENDLESS: Final = {("GET", "/events")}
COSTLY: Final = {
    *(("POST", f"/sandboxes/{{sandbox_id}}/{verb}") for verb in ("suspend", "resume", "snapshot", "restore", "fork")),
    ("POST", "/snapshots/import"),
}
"""For those whose sandbox it is; others are refused in no time. These have one to throw away (`test_what_costs_…`)."""

ENDING: Final = {("DELETE", "/sandboxes/{sandbox_id}"), ("DELETE", "/principals/self")}
OPERATIONS: Final = [
    (method.upper(), path)
    for path, verbs in DOCUMENT["paths"].items()
    for method in verbs
    if (method.upper(), path) not in ENDLESS
]
NOBODYS = "nobodys00id"
BOX: Final = {"spec": {"preload": []}, "terms": {"timeout_s": None}}
SHORT_S = 600.0


@schemathesis.serializer("application/x-tar", "application/zstd")
def raw(context: object, value: object) -> object:
    """Archives go out as the bytes that they are, or are not."""
    return value if isinstance(value, (bytes, str)) else json.dumps(value).encode()


POSITIVE, MODES = GenerationMode.POSITIVE, (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


def fields_of(path: str, method: str) -> bool:
    """Whether there is anything about such a request that can be wrong."""
    told = DOCUMENT["paths"][path][method.lower()]
    return bool(told.get("parameters") or told.get("requestBody"))


def weight(path: str, method: str) -> int:
    """Of how many parts requests of that verb are made, but for paths: so many more of them are worth sending."""
    told = DOCUMENT["paths"][path][method.lower()]
    return 1 + sum(one["in"] != "path" for one in told.get("parameters", ())) + 3 * ("requestBody" in told)


class Callers:
    """Two principals, and the sandbox of the first; and a third one, whose sandboxes nobody needs."""

    def __init__(self, socket: str, tokens: dict[str, str], keeper: SyncKeeperClient) -> None:
        self.http = httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://keeper", timeout=120)
        self._tokens, self._keeper = tokens, keeper
        self._throwaway = ""
        self.box = self._asked("ann", "POST", "/sandboxes", json=BOX).json()["id"]

    def ask(self, who: str, case: schemathesis.Case, sandbox_id: str) -> httpx.Response:
        """The answer to a case that is about that sandbox."""
        if "sandbox_id" in case.path_parameters:
            case.path_parameters["sandbox_id"] = sandbox_id
        wanted = case.body.get("timeout_s") if isinstance(case.body, dict) else None
        if isinstance(wanted, (int, float)) and 0 < wanted < SHORT_S:  # its end is not what this is about
            case.body["timeout_s"] = SHORT_S
        how = case.as_transport_kwargs(base_url=f"http://keeper{API}")
        headers = {name: value for name, value in how["headers"].items() if name.lower() != "authorization"}
        body = {"json": how["json"]} if "json" in how else {"content": how.get("data")}
        if not isinstance(body.get("content", b""), (bytes, str, type(None))):
            body = {"content": json.dumps(body["content"]).encode()}
        request = self.http.build_request(
            how["method"],
            how["url"],
            params=how.get("params"),
            headers={**headers, "Authorization": f"Bearer {self._tokens[who]}"},
            **body,
        )
        return self.http.send(request)

    def throwaway(self) -> str:
        """A sandbox of cy's that runs: the last one, unless it was changed, and nothing else of cy's does."""
        if "cy" not in self._tokens or self._asked("cy", "GET", "/principals/self").status_code != HTTPStatus.OK:
            quota = {"sandboxes": 3}
            self._tokens["cy"] = self._keeper.post("/tokens", {"principal": "cy", "quota": quota})["token"]
        there = {one["id"]: one["state"] for one in self._asked("cy", "GET", "/sandboxes").json()["sandboxes"]}
        for sandbox_id in there:
            if sandbox_id != self._throwaway or there[sandbox_id] != "running":
                self._asked("cy", "DELETE", f"/sandboxes/{sandbox_id}")
        if there.get(self._throwaway) != "running":
            self._throwaway = self._asked("cy", "POST", "/sandboxes", json=BOX).json()["id"]
        return self._throwaway

    def saved(self) -> str:
        """A snapshot of that sandbox's; something else where there are none on this machine."""
        made = self._asked("cy", "POST", f"/sandboxes/{self._throwaway}/snapshot", json={})
        return str(made.json().get("id", "none"))

    def state(self) -> str:
        """Of the sandbox, as the one sees it whose it is."""
        return str(self._asked("ann", "GET", f"/sandboxes/{self.box}").json()["state"])

    def _asked(self, who: str, method: str, path: str, **how: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._tokens[who]}"}
        return self.http.request(method, API + path, headers=headers, **how)


@pytest.fixture(scope="module")
def home() -> Iterator[Places]:
    """Directories of one keeper for all tests of this module."""
    with own_places() as made:
        config = made.root / "jupyter" / "config"
        config.mkdir(parents=True)
        lines = ["c.Warmcell.backend = 'bubblewrap'", "c.Warmcell.prepared = 0", "c.Warmcell.keeper_idle_s = 0.2"]
        (config / "jupyter_warmcell_config.py").write_text("\n".join(lines))
        yield made


@pytest.fixture(scope="module")
def callers(home: Places) -> Iterator[Callers]:
    """At one keeper, which has room for no sandbox but the one that is there."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in home.env.items():
            patch.setenv(name, value)
        with SyncKeeperClient.connect() as keeper:
            quota = {"sandboxes": 1}
            tokens = {
                name: keeper.post("/tokens", {"principal": name, "quota": quota})["token"] for name in ("ann", "bob")
            }
            made = Callers(str(home.runtime / "keeper.sock"), tokens, keeper)
            yield made
            made.http.close()
            keeper.delete("/principals/cy")
            keeper.delete(f"/sandboxes/{made.box}")


def send_many(operation: tuple[str, str], examples: int, send: Callable[[schemathesis.Case], None]) -> None:
    """So many sound and unsound requests of one verb, the same each time."""
    method, path = operation
    one = SCHEMA[path][method]
    cases = st.one_of(
        *(one.as_strategy(generation_mode=mode) for mode in MODES if mode is POSITIVE or fields_of(path, method))
    )

    @seed(7)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def each(case: schemathesis.Case) -> None:
        send(case)

    each()


def judge(case: schemathesis.Case, answer: httpx.Response) -> None:
    """An answer is one of the document's, and a refusal has words and a cure."""
    if answer.status_code not in OURS:
        case.validate_response(answer, checks=[not_a_server_error, *CHECKS])
    if answer.status_code >= 400:
        told = answer.json()
        assert set(told) == {"code", "message", "hint", "details"}, told
        assert told["hint"], told


def check(callers: Callers, operation: tuple[str, str], examples: int) -> None:
    """Send so many requests of one verb for three callers, and compare the answers with the document."""
    method, path = operation

    def send(case: schemathesis.Case) -> None:
        if "sandbox_id" in (case.path_parameters or {}):
            real, none = callers.ask("bob", case, callers.box), callers.ask("bob", case, NOBODYS)
            assert real.status_code == none.status_code, real.text
            assert real.text.replace(callers.box, NOBODYS) == none.text
            ends = method == "DELETE" and path == "/sandboxes/{sandbox_id}"
            assert none.status_code == (204 if ends else 404), (operation, none.text)
        if operation in COSTLY | ENDING:
            return
        judge(case, callers.ask("ann", case, callers.box))

    send_many(operation, examples, send)


def check_costly(callers: Callers, operation: tuple[str, str], examples: int) -> None:
    """Send so many requests of one verb for one whose sandbox it is, which may be another one each time."""
    _, path = operation

    def send(case: schemathesis.Case) -> None:
        sandbox_id = callers.throwaway()
        wanted = case.body.get("snapshot") if isinstance(case.body, dict) else None
        if isinstance(wanted, str) and path.endswith("/restore") and len(wanted) % 2 == 0:
            case.body["snapshot"] = callers.saved()
        judge(case, callers.ask("cy", case, sandbox_id))

    send_many(operation, examples, send)


def test_answers_are_those_of_the_document_and_nothing_of_anothers_shows(callers: Callers) -> None:
    """Every verb: no accident, whatever is sent; and the sandbox is still there afterwards."""
    for operation in OPERATIONS:
        check(callers, operation, min(6, 1 + weight(operation[1], operation[0])))
        assert callers.state() == "running", operation


def test_what_costs_or_ends_a_sandbox_answers_so_too(callers: Callers) -> None:
    """For those whose sandbox it is: a few of each."""
    for operation in sorted(COSTLY | ENDING):
        check_costly(callers, operation, 2)


@pytest.mark.long
@pytest.mark.parametrize("operation", sorted(COSTLY | ENDING), ids=lambda operation: f"{operation[0]} {operation[1]}")
def test_many_more_that_cost_or_end_a_sandbox_are_answered_so(callers: Callers, operation: tuple[str, str]) -> None:
    """The same with 40 of each verb."""
    check_costly(callers, operation, 40)


@pytest.mark.long
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: f"{operation[0]} {operation[1]}")
def test_many_more_requests_are_answered_so(callers: Callers, operation: tuple[str, str]) -> None:
    """The same with 500 of each verb."""
    check(callers, operation, 500)
    assert callers.state() == "running"
