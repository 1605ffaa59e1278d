"""Sandboxes that reach named hosts: real programs in real sandboxes, and a server of the operator's own."""

import contextlib
import json
import sys

import pytest

from tests.integration.sandboxes.index import PASSWORD, PackageServer
from tests.leaks import Places
from warmcell import Sandbox
from warmcell.sandbox import errors

pytestmark = pytest.mark.bubblewrap

GET = """
import urllib.request
def get(url):
    try:
        return urllib.request.build_opener().open(url, timeout=60).read().decode()  # Reads the variables anew.
    except urllib.error.HTTPError as error:
        return error.headers.get("warmcell-refused") or str(error.code)
    except OSError as error:
        return str(error)
"""


def got(box: Sandbox, url: str) -> str:
    """What its kernel gets from there."""
    ran = box.run(f"print(get({url!r}))")
    assert ran.error is None, ran.error
    return ran.stdout.strip()


def test_pip_installs_from_the_operators_index_whose_password_stays_outside(index: PackageServer, home: Places) -> None:
    """The index wants a password and gets it; nothing in the sandbox has it, and no file of the keeper's."""
    with Sandbox(preload=(), network={"packages": True}) as box:
        pip = (sys.executable, "-m", "pip", "install", "--target", "/tmp/here", "--no-cache-dir", "warmcell-planted")
        installed = box.exec(*pip, timeout=300)
        assert installed.exit_code == 0, installed.stderr
        ran = box.run("import sys; sys.path.append('/tmp/here'); import warmcell_planted; warmcell_planted.HERE")
        assert ran.text == "'planted'"
        seen = box.exec("sh", "-c", "env; cat /proc/*/environ; cat /run/warmcell/*.json /run/warmcell/*.pem").stdout
        assert PASSWORD not in seen + installed.stdout + json.dumps(box.info().to_json())
        assert "PIP_INDEX_URL=https://localhost:" in seen
        assert box.metrics().network.allowed >= 2
    assert index.refused == 0
    logged = (home.root / "s" / "keeper.log") if (home.root / "s").exists() else None
    for log in [logged] if logged else home.root.rglob("keeper.log"):
        text = log.read_text()
        assert '"decision": "allowed"' in text
        assert PASSWORD not in text


def test_what_is_reached_can_be_changed_and_its_kernel_knows(index: PackageServer) -> None:
    """From nothing to the index to nothing, in one kernel; other places never, by the proxy or past it."""
    hello = f"{index.place}/hello"
    with Sandbox(preload=()) as box:
        box.run(GET)
        assert got(box, hello) != "hello"
        box.set_network({"packages": True})
        assert got(box, hello) == "hello"
        assert box.info().egress is not None
        refused = got(box, "https://elsewhere.example/")
        assert "403" in refused
        for address in ("169.254.169.254", "10.0.0.1", "[::1]"):
            assert got(box, f"http://{address}/") == "the host is not allowed"
        direct = box.run("import socket; socket.create_connection(('1.1.1.1', 443), timeout=5)")
        assert direct.error is not None
        assert box.metrics().network.refused >= 4
        box.set_network("none")
        assert got(box, hello) != "hello"
        assert box.info().egress is None
        with pytest.raises(errors.InvalidRequestError):
            box.set_network({"allow": ["http://x"]})


@pytest.mark.criu
def test_it_stays_through_suspending_and_forking_and_each_clone_counts_for_itself(index: PackageServer) -> None:
    """A connection that was open is made anew; what was trusted is trusted still."""
    keep = f"""
import http.client, ssl, os
proxy = os.environ["HTTPS_PROXY"].rpartition(":")[2]
kept = http.client.HTTPSConnection("127.0.0.1", int(proxy), context=ssl.create_default_context())
kept.set_tunnel("localhost", {index.port})
def again():
    for attempt in range(2):
        try:
            kept.request("GET", "/hello")
            return kept.getresponse().read().decode()
        except (OSError, http.client.HTTPException):
            kept.close()
"""
    with contextlib.ExitStack() as stack:
        box = stack.enter_context(Sandbox(preload=(), timeout=None, network={"packages": True}))
        assert box.run(keep).error is None
        assert box.run("again()").text == "'hello'"
        box.suspend()
        assert box.run("again()").text == "'hello'"
        allowed = box.metrics().network.allowed
        clones = [stack.enter_context(clone) for clone in box.fork(2)]
        for clone in clones:
            assert clone.metrics().network.allowed == 0
            assert clone.run("again()").text == "'hello'"
            assert clone.metrics().network.allowed == 1
        assert box.run("again()").text == "'hello'"
        assert box.metrics().network.allowed >= allowed
        clones[0].set_network("none")
        assert clones[0].run("again()").text is None
        assert clones[1].run("again()").text == "'hello'"
