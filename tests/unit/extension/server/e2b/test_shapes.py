"""What E2B's requests ask for, and what must be refused rather than forgotten."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from tornado import httputil

from warmcell.extension.server.e2b import languages, results, shapes
from warmcell.extension.server.e2b.fields import Fields
from warmcell.extension.server.e2b.handler import Target, target
from warmcell.extension.server.e2b.interpreter import health
from warmcell.extension.server.e2b.routing import E2bMatcher, hosts_of
from warmcell.sandbox.errors import InvalidRequestError, SandboxNotFoundError, UnsupportedOperationError
from warmcell.sandbox.guest.languages import COMMANDS
from warmcell.sandbox.models import EgressProxy, NetworkPolicy, Terms


def test_a_gpu_is_asked_for_by_the_templates_name_or_by_metadata() -> None:
    """E2B has no field for it."""
    assert shapes.new_sandbox(Fields({"templateID": "base"})).gpu is None
    assert shapes.new_sandbox(Fields({"templateID": "base:H100:2"})).gpu == "H100:2"
    by_metadata = shapes.new_sandbox(Fields({"templateID": "base", "metadata": {"gpu": "A100"}}))
    assert (by_metadata.gpu, by_metadata.name, by_metadata.usual) == ("A100", "base", True)


def test_timeouts_kill_unless_a_pause_was_asked_for() -> None:
    """E2B's own default, and its time of five minutes."""
    terms = shapes.new_sandbox(Fields({"templateID": "base"})).terms
    assert (terms["timeout_s"], terms["on_timeout"], terms["auto_resume"]) == (300, "kill", False)
    body = {"templateID": "base", "timeout": 60, "autoPause": True, "autoResume": {"enabled": True}}
    terms = shapes.new_sandbox(Fields(body)).terms
    assert (terms["timeout_s"], terms["on_timeout"], terms["auto_resume"]) == (60, "suspend", True)
    assert terms["keeps_memory"] is True
    assert shapes.new_sandbox(Fields({**body, "autoPauseMemory": False})).terms["keeps_memory"] is False


@pytest.mark.parametrize(
    "more",
    [
        {"iam": {"tokens": {"t": {"audience": "a"}}}},
        {"volumeMounts": [{"name": "v", "path": "/v"}]},
        {"network": {"allowOut": ["a.b"], "rules": {"a.b": [{"transform": {"headers": {"X": "${e2b.identity.x}"}}}]}}},
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_made(more: dict[str, Any]) -> None:
    """Never silently: a sandbox that is not as it was asked for is worse than none."""
    with pytest.raises(UnsupportedOperationError):
        shapes.new_sandbox(Fields({"templateID": "base", **more}))


@pytest.mark.parametrize(
    "more",
    [
        {"volumeMounts": []},
        {"iam": {"tokens": {}}},
        {"network": {"denyOut": ["0.0.0.0/0"]}},
        {"network": {"maskRequestHost": "localhost:${PORT}"}},
        {"network": {"dnsServers": ["1.1.1.1"], "egressProxy": {"address": "a.example.com:1080"}}},
        {"secure": True},
    ],
)
def test_what_asks_for_no_more_than_there_is_is_taken(more: dict[str, Any]) -> None:
    """Sandboxes have no network, so that what forbids one is fulfilled."""
    assert shapes.new_sandbox(Fields({"templateID": "base", **more})).network is None


def test_ports_are_for_everybody_only_where_both_want_it() -> None:
    """The operator and who makes the sandbox; what cannot be had is not taken in silence."""
    wants = Fields({"templateID": "base", "network": {"allowPublicTraffic": True}})
    with pytest.raises(InvalidRequestError, match="not for everybody"):
        shapes.new_sandbox(wants)
    for asked, opened in ((True, True), (False, False)):
        body = Fields({"templateID": "base", "network": {"allowPublicTraffic": asked}})
        info = {"egress": None, "terms": {**shapes.new_sandbox(body, public=True).terms}}
        assert shapes.is_public(info) == opened
    assert not shapes.is_public({"terms": {**shapes.new_sandbox(Fields({"templateID": "base"}), public=True).terms}})


def test_ways_in_and_out_are_taken_as_they_are_asked_for() -> None:
    """In our words for the keeper, and in E2B's again without what nobody is to see."""
    proxy = {"address": "p.example.com:1080", "username": "ann", "password": "secret"}
    tls = {"enabled": True, "serverName": "q.example.com", "caCert": "PEM"}
    rules = {"allowOut": ["a.b"], "dnsServers": ["1.1.1.1"], "egressProxy": {**proxy, "tls": tls}}
    ports = {"httpsPorts": [3443, 8443], "maskRequestHost": "${PORT}-app.example.com"}
    wanted = shapes.new_sandbox(Fields({"templateID": "base", "network": {**rules, **ports}}))
    assert (wanted.terms["port_host"], wanted.terms["tls_ports"]) == ("${PORT}-app.example.com", [3443, 8443])
    assert wanted.network is not None
    policy = NetworkPolicy.from_json(wanted.network)
    assert (policy.name_servers, policy.allow) == (("1.1.1.1",), ("a.b",))
    assert policy.through == EgressProxy(
        **proxy,
        tls=True,
        server_name="q.example.com",
        certificates="PEM",  # type: ignore[arg-type]
    )
    terms = Terms.from_json({**wanted.terms, "tls_ports": [3443, 8443]})
    shown = shapes.shown_policy({"egress": policy.to_json(), "terms": terms.to_json()})["network"]
    assert shown["egressProxy"] == {
        **{"address": "p.example.com:1080", "username": "ann"},
        "tls": {"enabled": True, "serverName": "q.example.com"},
    }
    assert (shown["dnsServers"], shown["httpsPorts"]) == (["1.1.1.1"], [3443, 8443])
    assert shown["maskRequestHost"] == "${PORT}-app.example.com"
    for wrong in ({"httpsPorts": [49983]}, {"httpsPorts": ["x"]}, {"httpsPorts": [70000]}, {"egressProxy": "x"}):
        with pytest.raises(InvalidRequestError):
            shapes.new_sandbox(Fields({"templateID": "base", "network": {"allowOut": ["a.b"], **wrong}}))


ADDED = {"api.example.com": [{"transform": {"headers": {"Authorization": "Bearer s"}}}]}


@pytest.mark.parametrize(
    ("body", "internet", "wanted"),
    [
        ({"allow_internet_access": True}, False, None),
        ({"allow_internet_access": True}, True, {"allow": ["*"], "deny": [], "headers": {}}),
        ({"allow_internet_access": False}, True, None),
        ({}, True, {"allow": ["*"], "deny": [], "headers": {}}),
        ({"network": {"denyOut": ["0.0.0.0/0"]}}, True, None),
        ({"network": {"denyOut": ["8.0.0.0/8"]}}, True, {"allow": ["*"], "deny": ["8.0.0.0/8"], "headers": {}}),
        ({"network": {"allowOut": ["a.b"], "denyOut": ["0.0.0.0/0"]}}, True, {"allow": ["a.b"]}),
        ({"allow_internet_access": False, "network": {"allowOut": ["a.b"]}}, True, {"allow": ["a.b"]}),
        ({"network": {"allowOut": ["a.b"]}}, False, {"allow": ["a.b"]}),
        (
            {"network": {"allowOut": ["*.b"], "denyOut": ["0.0.0.0/0", "a.b"]}},
            True,
            {"allow": ["*.b"], "deny": ["a.b"]},
        ),
        ({"network": {"allowOut": ["0.0.0.0/0"]}}, False, {"allow": ["*"]}),
        (
            {"network": {"allowOut": ["api.example.com"], "rules": ADDED}},
            False,
            {"headers": {"api.example.com": {"Authorization": "Bearer s"}}},
        ),
    ],
)
def test_what_is_reached_is_said_in_our_words(
    body: dict[str, Any], internet: bool, wanted: dict[str, Any] | None
) -> None:
    """Clients always ask for the internet, so that alone opens nothing unless the operator says so."""
    found = shapes.new_sandbox(Fields({"templateID": "base", **body}), internet=internet).network
    assert (found is None) == (wanted is None)
    assert found is None or {**found, **(wanted or {})} == found


def test_headers_are_for_hosts_that_are_allowed() -> None:
    """As E2B has it: a rule alone allows nothing."""
    with pytest.raises(InvalidRequestError, match="not allowed"):
        shapes.new_sandbox(Fields({"templateID": "base", "network": {"allowOut": ["a.b"], "rules": ADDED}}))


def test_metadata_may_not_pass_for_ours() -> None:
    """The template is noted among the tags."""
    with pytest.raises(InvalidRequestError):
        shapes.new_sandbox(Fields({"templateID": "base", "metadata": {"e2b.template": "x"}}))


def test_requests_name_their_sandbox_by_headers_or_host() -> None:
    """Headers first; a host with a port and an id second; neither: the control plane."""
    headers, hosts = {"E2b-Sandbox-Id": "abc", "E2b-Sandbox-Port": "49983"}, hosts_of("", alone=True)
    assert target(headers, "3000-other.example.com", hosts) == Target("abc", 49983)
    assert target({}, "49999-abcdef012345.example.com:8888", hosts) == Target("abcdef012345", 49999, by_host=True)
    assert target({}, "localhost:8888", hosts) is None
    assert target({}, "49999-abcdef012345.example.com:8888", None) is None
    with pytest.raises(InvalidRequestError):
        target({"E2b-Sandbox-Id": "abc"}, "localhost", hosts)
    with pytest.raises(InvalidRequestError):
        target({"E2b-Sandbox-Id": "abc", "E2b-Sandbox-Port": "x"}, "localhost", hosts)


@pytest.mark.parametrize(
    ("host", "beside", "alone", "below"),
    [
        ("8888-abcdef012345.boxes.example", False, True, True),
        ("8888-ABCDEF012345.Boxes.Example:8443", False, True, True),
        ("8888-abcdef012345.proxy.elsewhere", False, True, False),
        ("8888-abcdef012345.boxes.example.elsewhere", False, True, False),
        ("8888-abcdef012345.boxes-example", False, True, False),
        ("8888-abcdef01234.boxes.example", False, False, True),  # which is then no sandbox's
        ("8888-abcdef0123456.proxy.elsewhere", False, False, False),
        ("8888-my-workspace.boxes.example", False, False, False),
        ("api.boxes.example", False, False, False),
        ("8888-abcdef012345", False, False, False),
        ("127.0.0.1:8888", False, False, False),
    ],
)
def test_a_servers_own_pages_are_never_taken_for_a_sandboxs(host: str, beside: bool, alone: bool, below: bool) -> None:
    """Proxies name servers as sandboxes are named: beside pages only the operator's domain says that one is meant."""
    for hosts, wanted in (
        (hosts_of("", alone=False), beside),
        (hosts_of("", alone=True), alone),
        (hosts_of("boxes.example", alone=False), below),
        (hosts_of("Boxes.example", alone=True), below),
    ):
        line = httputil.RequestStartLine("GET", "/lab", "HTTP/1.1")
        request = httputil.HTTPServerRequest(start_line=line, headers=httputil.HTTPHeaders({"Host": host}))
        assert (E2bMatcher("/", hosts).match(request) is not None) is wanted, hosts
        assert (target({}, host, hosts) is not None) is wanted, hosts


@pytest.mark.parametrize(
    ("state", "frozen", "healthy"),
    [("running", False, True), ("running", True, False), ("suspended", False, False), ("stopping", False, False)],
)
async def test_a_sandbox_is_healthy_exactly_where_it_is_told_as_running(
    state: str, frozen: bool, healthy: bool
) -> None:
    """One that is frozen in memory is paused by every call."""
    info = {"state": state, "terms": {"frozen": frozen}}
    answers: list[int] = []

    async def ask(method: str, path: str) -> dict[str, Any]:
        return info

    request: Any = SimpleNamespace(
        sandbox_id="abcdef012345",
        keeper=SimpleNamespace(ask=ask),
        answer=lambda what, status: answers.append(status),
    )
    if healthy:
        await health(request)
        assert answers == [204]
    else:
        with pytest.raises(SandboxNotFoundError):
            await health(request)


def test_results_have_e2bs_names() -> None:
    """Formats by their own names, the others in `extra`, texts without the quotes of their literals."""
    data = {"text/plain": "'hi'", "image/png": "AA==", "application/x-own": 1}
    told = results.line({"msg_type": "execute_result", "content": {"data": data}})
    assert told == {
        "type": "result",
        "text": "hi",
        "png": "AA==",
        "extra": {"application/x-own": 1},
        "is_main_result": True,
    }
    assert results.line({"msg_type": "clear_output", "content": {}}) is None


def test_a_run_that_was_cut_short_says_so() -> None:
    """An error line where the kernel had none, and always the last line."""
    run = {"execution_count": 2, "status": "timeout", "error": {"code": "timeout", "message": "too slow"}}
    kinds = [line["type"] for line in results.ending(run, shown=False)]
    assert kinds == ["number_of_executions", "error", "end_of_execution"]
    assert [line["type"] for line in results.ending({**run, "status": "error"}, shown=True)][-2:] == [
        "number_of_executions",
        "end_of_execution",
    ]


def test_code_of_another_language_does_not_grow_beyond_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four mebibytes of characters that a literal writes as four are run as they are."""
    code = "\x00" * (4 * 2**20)
    asked = languages.as_python(code, "bash")
    assert len(json.dumps({"code": asked})) < 8 * 2**20
    ran: list[tuple[str, str]] = []
    runner: Any = SimpleNamespace(run=lambda language, text: ran.append((language, text)))
    monkeypatch.setitem(sys.modules, "warmcell_guest", runner)
    monkeypatch.setitem(sys.modules, "warmcell_guest.languages", runner)
    exec(asked, {})
    assert ran == [("bash", code)]


def test_the_language_of_a_context_is_in_its_id() -> None:
    """Those of the guest are those that are known here, by the names that clients have for them."""
    assert set(languages.OTHERS) == set(COMMANDS)
    assert [languages.known(name) for name in ("", "JS", "ts", "R")] == ["python", "javascript", "typescript", "r"]
    for language in (*languages.OTHERS, languages.PYTHON):
        made = languages.new_context(language)
        assert (languages.of_context(made), languages.is_usual(made)) == (language, False)
    assert (languages.of_context("bash"), languages.is_usual("bash")) == ("bash", True)
    assert languages.of_context("bash-mine") == "python"


def test_a_log_is_read_from_either_end() -> None:
    """From a time on, by level and words, and no more than are wanted."""
    said = [("info", "a"), ("warn", "b"), ("info", "ab")]
    log = [
        {"timestamp": shapes.iso(1000.5 + at), "level": level, "message": text, "fields": {"cmd": "x"}}
        for at, (level, text) in enumerate(said)
    ]
    texts = [
        [one["message"] for one in shapes.asked_of_log(log, **how)]
        for how in (
            {},
            {"most": 2},
            {"direction": "backward", "most": 2},
            {"since_ms": 1001500},
            {"since_ms": 1001500, "direction": "backward"},
            {"level": "warn"},
            {"search": "a"},
            {"search": "x", "level": "error"},
        )
    ]
    assert texts == [["a", "b", "ab"], ["a", "b"], ["ab", "b"], ["b", "ab"], ["b", "a"], ["b"], ["a", "ab"], []]
    assert len(shapes.asked_of_log(log * 1000)) == shapes.LOGS_MAX
    for wrong in ({"level": "loud"}, {"direction": "up"}):
        with pytest.raises(InvalidRequestError):
            shapes.asked_of_log(log, **wrong)
