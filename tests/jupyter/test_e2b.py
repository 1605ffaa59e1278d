"""The published clients of E2B, unchanged, against a server: one line of scenarios.py a test, one server for all."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx
import pytest
import trustme

from benchmarks.server import JupyterServer
from tests.jupyter.e2b import page
from tests.jupyter.e2b.packages import BETWEEN, NEWEST, OLDEST, ONCE, environment, scenario_names
from tests.leaks import Places, own_places
from warmcell.extension.server.e2b.handler import PREFIX
from warmcell.sandbox.client.keeper import SyncKeeperClient

pytestmark = [pytest.mark.bubblewrap, pytest.mark.criu]

API = "/warmcell/api/v1"
SCENARIOS = Path(__file__).parent / "e2b" / "scenarios.py"
NAMES = scenario_names(SCENARIOS)
VERSIONS, VERSIONS_OF_ONCE = (
    [
        pytest.param(versions, id=versions[0], marks=[] if versions in usual else pytest.mark.long)
        for versions in (OLDEST, NEWEST, *BETWEEN)
    ]
    for usual in ((OLDEST, NEWEST), (NEWEST,))
)
RESULTS = "WARMCELL_E2B_RESULTS"
"""A file that gets a line of JSON for each scenario that has run: what scripts/e2b-versions makes its table of."""

METHOD = re.compile(r'"method": "(\w+)"')
URL = re.compile(r'"url": f?"([^"]+)"')
CONNECT = re.compile(r'name="(\w+)"')
VARIABLE = re.compile(r"\bE2B_[A-Z_]+\b")
NAMED = re.compile(r"\{\w+\}")
FIELD = re.compile(r'(?:field_dict\["|^ {16}")(\w+)"(?:\]|: )', re.MULTILINE)
MODELS = ("new_sandbox*", "connect_sandbox*", "sandbox", "sandbox_*", "listed_sandbox", "snapshot_info", "error")
"""Of the newest package, what has to do with sandboxes; templates, volumes and secrets are 501 as a whole."""

DOMAIN = "sandboxes.test"
END_TIMEOUT_S = 120
GPUS = [{"name": "L4", "memory": "24GiB", "count": 1}]


@pytest.fixture(scope="module")
def home() -> Iterator[Places]:
    """Directories of one server and its keeper for all tests of this module."""
    with own_places() as made:
        config = made.root / "jupyter" / "config"
        config.mkdir(parents=True)
        lines = ["c.Warmcell.backend = 'bubblewrap'", "c.Warmcell.keeper_idle_s = 0.2", "c.Warmcell.prepared = 0"]
        lines += ["c.Warmcell.e2b_public_ports = True"]
        lines += [f"c.Warmcell.simulated_gpus = {GPUS!r}", "c.Warmcell.gpu_wait = 0.0"]
        lines += ["c.Warmcell.egress_allowed = c.Warmcell.egress_principals = ['*.example.com', '198.41.0.4:53']"]
        (config / "jupyter_warmcell_config.py").write_text("\n".join(lines))
        yield made


@pytest.fixture(scope="module")
def server(home: Places) -> Iterator[dict[str, str]]:
    """`warmcell serve`: its URL and its token."""
    argv = [str(Path(sys.executable).parent / "warmcell"), "serve", "--json", "--port", "0"]
    with running(argv, {**os.environ, **home.env}) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        at = {"base_url": said["url"], "headers": {"Authorization": f"token {said['token']}"}, "timeout": END_TIMEOUT_S}
        with httpx.Client(**at) as http:
            # Without any sandbox the keeper would end, and begin anew with the next one.
            http.post(f"{API}/sandboxes", json={"terms": {"timeout_s": None}}).raise_for_status()
        yield said
        with httpx.Client(**at) as http:
            for info in http.get(f"{API}/sandboxes").json()["sandboxes"]:  # that, and those of tests that failed
                http.delete(f"{API}/sandboxes/{info['id']}")


@pytest.fixture(scope="module")
def domain(server: dict[str, str], home: Places) -> Iterator[dict[str, str]]:
    """The server behind a wildcard domain with TLS, as a proxy in front of it has it: what clients need to know."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(home.root / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(f"*.{DOMAIN}").configure_cert(context)
    behind = urlsplit(server["url"])
    assert behind.hostname is not None
    assert behind.port is not None
    proxy = TlsProxy(context, (behind.hostname, behind.port))
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    yield {"E2B_DOMAIN": f"{DOMAIN}:{proxy.server_address[1]}", "SSL_CERT_FILE": str(home.root / "ca.pem")}
    proxy.shutdown()
    proxy.server_close()
    thread.join()


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest, server: dict[str, str], domain: dict[str, str]) -> Iterator["Client"]:
    """One client of one version for all tests. The oldest one's code interpreter knows the way by the domain alone."""
    base = server["url"] + PREFIX
    where = domain if request.param == OLDEST else {"E2B_API_URL": base, "E2B_SANDBOX_URL": base}
    with client_of(request.param, {**where, "E2B_API_KEY": server["token"]}) as made:
        yield made


class Client:
    """A process that has the packages, and runs one scenario after another."""

    def __init__(self, process: "subprocess.Popen[str]", versions: tuple[str, str]) -> None:
        self._process = process
        self.versions = versions

    def run(self, name: str) -> dict[str, Any]:
        """What became of a scenario."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said


class TlsProxy(socketserver.ThreadingTCPServer):
    """Takes connections with TLS and passes on what is in them."""

    daemon_threads = False

    def __init__(self, context: ssl.SSLContext, behind: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self._context, self._behind = context, behind

    def finish_request(self, request: Any, address: Any) -> None:
        """One connection, until either side ends it."""
        with (
            contextlib.suppress(OSError),
            socket.create_connection(self._behind) as server,
            self._context.wrap_socket(request, server_side=True) as client,
        ):
            back = threading.Thread(target=pass_on, args=(server, client))
            back.start()
            pass_on(client, server)
            back.join()


def pass_on(source: socket.socket, target: socket.socket) -> None:
    """All bytes of one direction; its end ends the other, too."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for one in (source, target):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def running(argv: list[str], env: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """A process that is ended afterwards."""
    process = subprocess.Popen(
        argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=END_TIMEOUT_S)


@contextlib.contextmanager
def client_of(versions: tuple[str, str], said: dict[str, str]) -> Iterator[Client]:
    """As a user of these packages sets it up: two or three variables."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(environment(*versions)), **said}
    with running([sys.executable, "-S", str(SCENARIOS)], env) as process:
        yield Client(process, versions)


@pytest.fixture(autouse=True)
def at_home(places: Places, home: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test starts belongs to that keeper."""
    for name, value in home.env.items():
        monkeypatch.setenv(name, value)


def test_a_gateway_that_its_sandbox_has_noted_itself_opens_nothing(server: dict[str, str]) -> None:
    """Who has a sandbox may write its tags; the port is for the token that the server has noted."""
    how = {"base_url": server["url"], "headers": {"Authorization": f"token {server['token']}"}}
    with httpx.Client(**how, timeout=END_TIMEOUT_S) as http:
        made = http.post(f"{PREFIX}/v2/sandboxes", json={"templateID": "base"}, headers={"X-API-KEY": server["token"]})
        path = f"{API}/sandboxes/{made.json()['sandboxID']}"
        noted = f"{hashlib.sha256(b'mine').hexdigest()}:"
        http.patch(path, json={"tags": {"e2b.gateway": noted}}).raise_for_status()
        headers = {"E2b-Sandbox-Id": made.json()["sandboxID"], "E2b-Sandbox-Port": "50005"}
        shown = {**headers, "Authorization": "Bearer mine"}
        assert http.get(f"{PREFIX}/mcp", headers=shown).status_code == 401
        http.delete(path).raise_for_status()


def test_each_call_and_field_of_the_newest_client_has_a_row() -> None:
    """What it can say and what it can be told, by its own package, is on the page: nothing is forgotten."""
    package = environment(*NEWEST) / "e2b"
    said = " ".join(what for what, _ in page.rows(page.PAGE.read_text()))
    calls = {
        f"{method.upper()} {path}"
        for text in texts(package / "api" / "client" / "api", "*/*.py")
        for method, path in zip(METHOD.findall(text), URL.findall(text), strict=True)
    }
    for service in ("process", "filesystem"):
        methods = CONNECT.findall((package / "envd" / service / f"{service}_connect.py").read_text())
        calls |= {f"{service}.{service.title()}/{name}" for name in methods}
    variables = set(VARIABLE.findall((package / "connection_config.py").read_text()))
    assert (len(calls), len(variables)) > (60, 8)
    plain = re.sub(r"\{\w+\}", "{}", said)
    assert not {call for call in calls if f"`{re.sub(NAMED, '{}', call)}`" not in plain}
    fields = {
        name
        for model in MODELS
        for text in texts(package / "api" / "client" / "models", f"{model}.py")
        for name in FIELD.findall(text)
    }
    assert len(fields) > 50
    assert not {name for name in fields | variables if f"`{name}`" not in said}


@pytest.mark.parametrize("client", VERSIONS_OF_ONCE, indirect=True, scope="module")
@pytest.mark.parametrize("name", ONCE)
def test_what_takes_seconds_works(client: Client, name: str) -> None:
    """As the next one; with the newest client alone where no long tests are asked for."""
    check(client, name)


@pytest.mark.parametrize("client", VERSIONS, indirect=True, scope="module")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONCE])
def test_published_clients_work(client: Client, name: str) -> None:
    """Each scenario's own sentence says what is promised; what a version does not have is skipped by name."""
    check(client, name)


def check(client: Client, name: str) -> None:
    """Run a scenario, and note what became of it where that is asked for."""
    said = client.run(name)
    if RESULTS in os.environ:
        with open(os.environ[RESULTS], "a", encoding="utf-8") as results:
            results.write(json.dumps({"version": client.versions, "name": name, "status": said["status"]}) + "\n")
    if said["status"] == "absent":
        pytest.skip(said["why"])
    assert said["status"] == "passed", said["why"]


@pytest.mark.parametrize("http", ["1.1", "2"])
def test_variables_of_the_transport_are_taken(server: dict[str, str], http: str) -> None:
    """HTTP's version, connection retries and the pool's sizes are the client's own; whatever they are, it works."""
    base = server["url"] + PREFIX
    said = {"E2B_API_URL": base, "E2B_SANDBOX_URL": base, "E2B_API_KEY": server["token"], "E2B_HTTP_VERSION": http}
    said |= {"E2B_CONNECTION_RETRIES": "1", "E2B_KEEPALIVE_EXPIRY": "1"}
    said |= {"E2B_MAX_KEEPALIVE_CONNECTIONS": "1", "E2B_MAX_CONNECTIONS": "2"}
    with client_of(NEWEST, said) as client:
        done = client.run("the_async_client_works_the_same")
    assert done["status"] == "passed", done["why"]


def test_quotas_are_rate_limits(server: dict[str, str], home: Places) -> None:
    """A principal that has all that it may have is told so by the exception that the package has for it."""
    base = server["url"] + PREFIX
    with SyncKeeperClient.connect() as keeper:
        token = keeper.post("/tokens", {"principal": "cat", "quota": {"sandboxes": 1}})["token"]
        with client_of(NEWEST, {"E2B_API_URL": base, "E2B_SANDBOX_URL": base, "E2B_API_KEY": token}) as client:
            done = client.run("what_is_too_much_is_told")
        keeper.delete("/principals/cat")
    assert done["status"] == "passed", done["why"]


async def test_a_jupyter_server_serves_them_beside_its_own(places: Places) -> None:
    """The newest client with the server's token; Jupyter's own paths are what they were."""
    async with JupyterServer(places, settings={"prepared": 0, "backend": "bubblewrap"}) as jupyter:
        base = jupyter.url + PREFIX
        said = {"E2B_API_URL": base, "E2B_SANDBOX_URL": base, "E2B_API_KEY": jupyter.token}
        with client_of(NEWEST, said) as client:
            done = await asyncio.to_thread(client.run, "create_info_and_kill")
        assert done["status"] == "passed", done["why"]
        assert (await jupyter.http.get("/api/status")).status_code == 200
        assert (await jupyter.http.get("/metrics")).headers["Content-Type"].startswith("text/plain")
        async with httpx.AsyncClient(base_url=base) as stranger:
            for key in ({}, {"X-API-KEY": "wrong"}, {"X-API-KEY": "wct_wrong"}):
                assert (await stranger.get("/v2/sandboxes", headers=key)).status_code == 401


def test_a_principals_token_is_a_key_of_its_own(server: dict[str, str], home: Places) -> None:
    """Whoever has it makes sandboxes of their own, and sees, uses and ends no others; revoked, it is no key."""
    with SyncKeeperClient.connect() as keeper:
        anns = keeper.post("/tokens", {"principal": "ann"})
        ann, user = {"X-API-KEY": anns["token"]}, {"X-API-KEY": server["token"]}
        with httpx.Client(base_url=server["url"] + PREFIX, timeout=60) as http:
            made = {
                name: http.post("/v2/sandboxes", json={"templateID": "base"}, headers=key).json()
                for name, key in (("ann", ann), ("user", user))
            }
            assert listed(http, ann) == {made["ann"]["sandboxID"]}
            assert listed(http, user) >= {made["ann"]["sandboxID"], made["user"]["sandboxID"]}
            others = made["user"]["sandboxID"]
            assert http.get(f"/sandboxes/{others}", headers=ann).status_code == 404
            assert http.delete(f"/sandboxes/{others}", headers=ann).status_code == 404
            assert http.post(f"/sandboxes/{others}/fork", json={}, headers=ann).status_code == 404
            for name, status in (("ann", 200), ("user", 401)):
                asked = {"E2b-Sandbox-Id": made[name]["sandboxID"], "E2b-Sandbox-Port": "49983"}
                asked["X-Access-Token"] = made["ann"]["envdAccessToken"]
                assert http.get("/envs", headers=asked).status_code == status
            keeper.post("/tokens", {"principal": "ann"})  # She is not gone with her first one.
            by_user = http.post(f"/sandboxes/{made['ann']['sandboxID']}/connect", json={"timeout": 60}, headers=user)
            opened = {"E2b-Sandbox-Id": made["ann"]["sandboxID"], "E2b-Sandbox-Port": "49983"}
            hers = {**opened, "X-Access-Token": made["ann"]["envdAccessToken"]}
            users = {**opened, "X-Access-Token": by_user.json()["envdAccessToken"]}
            url = signed_url(made["ann"]["envdAccessToken"], "kept")
            assert http.post("/files", params={"path": "kept"}, files={"file": b"x"}, headers=hers).status_code == 200
            assert http.get("/envs", headers=hers).status_code == 200
            assert http.get(url).status_code == 200
            keeper.delete(f"/tokens/{anns['id']}")
            assert http.get("/v2/sandboxes", headers=ann).status_code == 401
            assert http.get("/envs", headers=hers).status_code == 401, "it was given out to who had that token"
            assert http.get(url).status_code == 401
            assert http.get("/envs", headers=users).status_code == 200
            assert http.delete(f"/sandboxes/{made['ann']['sandboxID']}", headers=user).status_code == 204
            assert http.delete(f"/sandboxes/{others}", headers=user).status_code == 204


@pytest.mark.criu
def test_anothers_snapshot_is_no_template(server: dict[str, str], home: Places) -> None:
    """Nobody else lists it, begins from it or deletes it, by its id or by its name."""
    with SyncKeeperClient.connect() as keeper, httpx.Client(base_url=server["url"] + PREFIX, timeout=60) as http:
        dora, eve = ({"X-API-KEY": keeper.post("/tokens", {"principal": name})["token"]} for name in ("dora", "eve"))
        made = http.post("/v2/sandboxes", json={"templateID": "base"}, headers=dora).json()["sandboxID"]
        saved = http.post(f"/sandboxes/{made}/snapshots", json={"name": "prepared"}, headers=dora).json()["snapshotID"]
        for ref in (saved, "prepared"):
            assert http.post("/v2/sandboxes", json={"templateID": ref}, headers=eve).status_code == 404
            assert http.delete(f"/templates/{ref}", headers=eve).status_code == 404
            assert http.get("/snapshots", params={"name": ref}, headers=eve).json() == []
        assert http.get("/snapshots", headers=eve).json() == []
        assert http.get("/snapshots", params={"sandboxID": made}, headers=eve).json() == []
        assert [one["snapshotID"] for one in http.get("/snapshots", headers=dora).json()] == [saved]
        assert http.delete(f"/templates/{saved}", headers=dora).status_code == 204
        for name in ("dora", "eve"):
            keeper.delete(f"/principals/{name}")


def test_who_may_only_look_gets_no_token_that_runs_code(server: dict[str, str], home: Places) -> None:
    """What opens a sandbox is told to nobody whose token lacks the scope `run`, whichever way it is asked for."""
    with SyncKeeperClient.connect() as keeper:
        tokens = [
            keeper.post("/tokens", {"principal": "bea", **more})["token"]
            for more in ({}, {"scopes": ["read", "snapshot"]})
        ]
        runs, looks = ({"X-API-KEY": token} for token in tokens)
        with httpx.Client(base_url=server["url"] + PREFIX, timeout=60) as http:
            made = http.post("/v2/sandboxes", json={"templateID": "base"}, headers=runs).json()
            path = f"/sandboxes/{made['sandboxID']}"
            assert "envdAccessToken" in http.get(path, headers=runs).json()
            seen = http.get(path, headers=looks)
            assert seen.status_code == 200
            assert "envdAccessToken" not in seen.json()
            assert http.post(f"{path}/connect", json={"timeout": 1}, headers=looks).status_code == 403
            assert http.post(f"{path}/fork", json={}, headers=looks).status_code == 403
            assert http.post(f"{path}/connect", json={"timeout": 1}, headers=runs).json()["envdAccessToken"]
        keeper.delete("/principals/bea")


def texts(directory: Path, pattern: str) -> Iterator[str]:
    """The files of a package."""
    return (file.read_text() for file in directory.glob(pattern))


def signed_url(token: str, path: str) -> str:
    """What E2B's clients make of a sandbox's token, to read a file of it."""
    digest = hashlib.sha256(f"{path}:read::{token}".encode()).digest()
    return f"/files?{urlencode({'path': path, 'signature': 'v1_' + base64.b64encode(digest).decode().rstrip('=')})}"


def listed(http: httpx.Client, key: dict[str, str]) -> set[str]:
    """The sandboxes that exist for whoever has that key."""
    return {one["sandboxID"] for one in http.get("/v2/sandboxes", headers=key).json()}
