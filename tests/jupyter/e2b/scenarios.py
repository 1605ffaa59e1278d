"""What the published packages `e2b` and `e2b-code-interpreter` do against Warmcell: one function a promise.

It runs in an environment that has these packages and nothing of ours. It reads names of functions, one a line, and
answers each with a line of JSON. E2B_API_URL and E2B_SANDBOX_URL, or else E2B_DOMAIN, and E2B_API_KEY are set as any
user of these packages sets them.
"""

import asyncio
import concurrent.futures
import functools
import importlib.metadata
import inspect
import json
import os
import socket
import sys
import threading
import time
import traceback
import urllib.parse
import uuid

import e2b
import e2b_code_interpreter
import httpcore
import httpx
from e2b_code_interpreter import AsyncSandbox, Sandbox

VERSION = tuple(int(part) for part in importlib.metadata.version("e2b").split("."))
DOMAIN = os.environ.get("E2B_DOMAIN", "")
API = os.environ.get("E2B_API_URL") or f"https://api.{DOMAIN}"
KEY = os.environ["E2B_API_KEY"]
HOME = "user\n/home/user\n/home/user\nuser\n"


class AbsentError(Exception):
    """This version of the package has no such thing."""


@functools.cache
def shared():
    """One sandbox for what leaves it as it is."""
    return Sandbox.create(timeout=600, metadata={"name": "shared"}, envs={"SAID": "to all"})


def needs(thing, name):
    if not hasattr(thing, name):
        raise AbsentError(name)


def raised(kind, work, *texts):
    """The exception that `work` raises, which is of that kind and says these texts."""
    try:
        got = work()
    except kind as error:
        for text in texts:
            assert text in str(error), (text, str(error))
        return error
    raise AssertionError(f"no {kind}, but {got!r}")


def control(method, path, body=None, **headers):
    """A call of the control plane that the package has no function for."""
    answer = httpx.request(method, API + path, json=body, headers={"X-API-KEY": KEY, **headers}, timeout=60)
    return answer.status_code, (answer.json() if answer.content else None)


def envd(box, method, path, port=49983, **how):
    """A call of a sandbox that the package has no function for."""
    headers = {
        "E2b-Sandbox-Id": box.sandbox_id,
        "E2b-Sandbox-Port": str(port),
        "X-Access-Token": box._envd_access_token,
        **how.pop("headers", {}),
    }
    return httpx.request(method, API + path, headers=headers, timeout=60, **how)


# --- control plane ---------------------------------------------------------------------------------------------------


def create_info_and_kill():
    """A sandbox is created as it was asked for, tells so, and is gone after kill: the second one finds none."""
    box = Sandbox.create(timeout=100, metadata={"a": "b c&d=é"}, envs={"MINE": "1"})
    info = box.get_info()
    assert info.sandbox_id == box.sandbox_id
    assert info.template_id == "code-interpreter-v1"
    assert info.metadata == {"a": "b c&d=é"}
    assert info.state == e2b.SandboxState.RUNNING
    assert info.cpu_count >= 1
    assert info.memory_mb > 0
    assert 60 < (info.end_at - info.started_at).total_seconds() < 160
    assert box.run_code("import os; os.environ['MINE']").text == "1"
    assert box.commands.run("echo $MINE").stdout == "1\n"
    assert box.is_running()
    assert box.kill() is True
    assert box.kill() is False
    assert box.is_running() is False


def create_paths_old_and_new():
    """Both create paths make a sandbox; an unknown one is 404."""
    for path in ("/sandboxes", "/v2/sandboxes"):
        status, made = control("POST", path, {"templateID": "base", "timeout": 60})
        assert status == 201, made
        assert {"templateID", "sandboxID", "clientID", "envdVersion", "envdAccessToken"} <= set(made)
        assert control("DELETE", f"/sandboxes/{made['sandboxID']}")[0] == 204
    if not DOMAIN:  # where nothing but its key tells a request at the server's root
        assert control("GET", "/nowhere")[0] == 404
    assert control("PATCH", "/sandboxes", {})[0] == 400


def create_twice_with_one_key_is_one_sandbox():
    """Idempotency-Key: the answer that was lost is given again, and no second sandbox is made."""
    key = {"Idempotency-Key": str(uuid.uuid4())}
    first = control("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 60}, **key)
    again = control("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 60}, **key)
    assert first[1]["sandboxID"] == again[1]["sandboxID"]
    assert control("DELETE", f"/sandboxes/{first[1]['sandboxID']}")[0] == 204
    assert control("POST", "/v2/sandboxes", {"templateID": "base"}, **{"Idempotency-Key": "with space"})[0] == 400


def keys_of_the_package_make_one_sandbox():
    """`idempotency_key`: the same sandbox for both calls."""
    if "idempotency_key" not in inspect.signature(Sandbox.create).parameters:
        raise AbsentError("idempotency_key")
    key = str(uuid.uuid4())
    boxes = [Sandbox.create(timeout=60, idempotency_key=key) for _ in range(2)]
    assert boxes[0].sandbox_id == boxes[1].sandbox_id
    assert boxes[0].kill()


def sandboxes_are_told_with_all_that_clients_need():
    """Every field that E2B's form of a sandbox requires, where it is made, alone, listed and connected to."""
    status, made = control("POST", "/sandboxes", {"templateID": "base", "timeout": 60, "secure": False})
    assert status == 201, made
    opened = {"templateID", "sandboxID", "clientID", "envdVersion", "envdAccessToken", "trafficAccessToken", "domain"}
    assert set(made) == opened
    assert made["templateID"] == "base"
    # What a client may ask of files, watchers and commands follows from this number.
    assert tuple(map(int, made["envdVersion"].split("."))) == (0, 6, 4)
    at = f"/sandboxes/{made['sandboxID']}"
    status, again = control("POST", f"/v2{at}/connect", {"timeout": 60})
    assert (status, again) == (200, made)
    listed = {"templateID", "sandboxID", "clientID", "startedAt", "endAt", "envdVersion", "cpuCount", "memoryMB"}
    listed |= {"diskSizeMB", "state", "metadata"}
    found = [one for one in control("GET", "/v2/sandboxes")[1] if one["sandboxID"] == made["sandboxID"]]
    assert [set(one) for one in found] == [listed]
    assert (found[0]["state"], found[0]["metadata"]) == ("running", {})
    assert min(found[0]["cpuCount"], found[0]["memoryMB"], found[0]["diskSizeMB"]) >= 1
    detail = control("GET", at)[1]
    assert set(detail) == listed | {"envdAccessToken", "domain", "allowInternetAccess", "network", "lifecycle"}
    assert detail["envdAccessToken"] == made["envdAccessToken"]
    assert detail["lifecycle"] == {"autoResume": False, "onTimeout": "kill"}
    bare = {"E2b-Sandbox-Id": made["sandboxID"], "E2b-Sandbox-Port": "49983"}
    assert httpx.get(API + "/envs", headers=bare).status_code == 401, "secure: false opens nothing here"
    assert control("DELETE", at)[0] == 204


def what_is_not_there_is_404():
    """In E2B's form, for every call that names a sandbox or a template; the package knows it by its exceptions."""
    for sandbox in ("nosuchsandbox", "a" * 12):
        at = f"/sandboxes/{sandbox}"
        for method, path, body in (
            ("GET", at, None),
            ("DELETE", at, None),
            ("POST", f"{at}/connect", {"timeout": 1}),
            ("POST", f"/v2{at}/connect", {"timeout": 1}),
            ("POST", f"{at}/resume", {}),
            ("POST", f"{at}/timeout", {"timeout": 1}),
            ("POST", f"{at}/refreshes", {"duration": 1}),
            ("POST", f"{at}/pause", {}),
            ("POST", f"{at}/fork", {}),
            ("POST", f"{at}/snapshots", {}),
            ("GET", f"{at}/metrics", None),
            ("GET", f"{at}/logs", None),
            ("GET", f"/v2{at}/logs", None),
            ("PUT", f"{at}/network", {}),
        ):
            status, error = control(method, path, body)
            assert (status, error["code"]) == (404, 404), (method, path, status, error)
            assert sandbox in error["message"], (method, path, error)
    assert control("DELETE", "/templates/nosuchsnapshot")[0] == 404
    assert Sandbox.kill("a" * 12) is False
    raised(e2b.SandboxException, lambda: Sandbox.connect("a" * 12), "not found")


def wrong_keys_are_refused():
    """401, as AuthenticationException; without a key as well."""
    raised(e2b.AuthenticationException, lambda: Sandbox.create(api_key="e2b_wrong"), "API key")
    raised(e2b.AuthenticationException, lambda: Sandbox.list(api_key="wct_wrong").next_items())
    assert httpx.get(API + "/v2/sandboxes", headers={"X-API-KEY": ""}).status_code == 401


def unknown_templates_are_refused():
    """With what there is instead."""
    raised(e2b.SandboxException, lambda: Sandbox.create("no-such-template"), "404", "no-such-template")


def gpus_are_asked_for_by_name():
    """In the template's name or in metadata; a machine without them says so."""
    raised(e2b.SandboxException, lambda: Sandbox.create("base:H100"), "H100")
    raised(e2b.SandboxException, lambda: Sandbox.create(metadata={"gpu": "A100"}), "A100")


def gpus_are_granted_and_waited_for():
    """The only one is granted; another request is told to come again, and the package does when it may be free."""
    if "idempotency_key" not in inspect.signature(Sandbox.create).parameters:
        raise AbsentError("idempotency_key, so it repeats no create")
    box = Sandbox.create("base:L4", timeout=300)
    body = {"templateID": "base", "metadata": {"gpu": "L4"}}
    busy = httpx.post(f"{API}/v2/sandboxes", json=body, headers={"X-API-KEY": KEY}, timeout=60)
    assert (busy.status_code, busy.json()["error_code"], busy.headers["Should-Retry"]) == (
        503,
        "no_gpu_available",
        "true",
    )
    assert 200 < int(busy.headers["Retry-After"]) <= 302
    raised(e2b.ServiceBusyException, lambda: Sandbox.create("base:L4"), "L4")
    box.set_timeout(2)
    other = Sandbox.create("base:L4", timeout=300)
    assert other.run_code("1 + 1").text == "2"
    other.kill()


def what_is_too_much_is_told():
    """429, as RateLimitException, where a principal has all that it may have; it runs for such a principal alone."""
    box = Sandbox.create(timeout=300)
    error = raised(e2b.RateLimitException, Sandbox.create)
    assert getattr(error, "status_code", 429) == 429
    assert box.kill()


def what_is_not_supported_is_refused():
    """Nothing of a request is dropped in silence."""
    for more in ({"iam": {"tokens": {"t": {}}}}, {"volumeMounts": [{"name": "v", "path": "/v"}]}):
        status, error = control("POST", "/v2/sandboxes", {"templateID": "base", **more})
        assert status == 501, error
        assert error["code"] == 501
        assert error["message"]
    status, error = control("POST", "/v2/sandboxes", {"templateID": "base", "timeout": "soon"})
    assert (status, error["error_code"]) == (400, "invalid_request")


def lists_come_in_pages_and_filtered():
    """By metadata, state and template, in pages that miss none and tell none twice, in both orders."""
    mark = uuid.uuid4().hex
    boxes = [Sandbox.create(timeout=120, metadata={"mark": mark, "n": str(n)}) for n in range(3)]
    query = e2b.SandboxQuery(metadata={"mark": mark})
    pages = Sandbox.list(query=query, limit=2)
    found = []
    while pages.has_next:
        page = pages.next_items()
        assert len(page) <= 2
        found += page
    assert [info.sandbox_id for info in found] == [box.sandbox_id for box in reversed(boxes)]
    assert found[-1].metadata == {"mark": mark, "n": "0"}
    paused = e2b.SandboxQuery(metadata={"mark": mark}, state=[e2b.SandboxState.PAUSED])
    assert Sandbox.list(query=paused).next_items() == []
    either = e2b.SandboxQuery(metadata={"mark": mark}, state=[e2b.SandboxState.PAUSED, e2b.SandboxState.RUNNING])
    assert len(Sandbox.list(query=either).next_items()) == 3
    _, oldest = control("GET", f"/v2/sandboxes?metadata=mark%3D{mark}&order=asc&template=code-interpreter-v1")
    assert [one["sandboxID"] for one in oldest] == [box.sandbox_id for box in boxes]
    since = urllib.parse.quote(oldest[1]["startedAt"])
    assert len(control("GET", f"/v2/sandboxes?metadata=mark%3D{mark}&startedAfter={since}")[1]) == 2
    assert control("GET", f"/v2/sandboxes?metadata=mark%3D{mark}&template=other")[1] == []
    assert control("GET", f"/v2/sandboxes?metadata=mark%3D{mark}&startedAfter=2999-01-01T00:00:00Z")[1] == []
    assert control("GET", "/v2/sandboxes?nextToken=x!")[0] == 400
    assert control("GET", "/v2/sandboxes?limit=0")[0] == 400
    assert len(control("GET", f"/sandboxes?metadata=mark%3D{mark}")[1]) == 3
    for box in boxes:
        box.kill()


def timeouts_are_set_anew():
    """set_timeout counts from now; refreshes is its older name; a sandbox whose time is over is gone."""
    box = Sandbox.create(timeout=60)
    before = box.get_info().end_at
    box.set_timeout(600)
    assert (box.get_info().end_at - before).total_seconds() > 400
    assert control("POST", f"/sandboxes/{box.sandbox_id}/refreshes", {"duration": 900})[0] == 204
    assert (box.get_info().end_at - before).total_seconds() > 700
    assert control("POST", f"/sandboxes/{box.sandbox_id}/timeout", {"timeout": 0})[0] == 204
    assert box.is_running() is False
    raised(e2b.SandboxException, lambda: Sandbox.connect(box.sandbox_id))


def pause_keeps_memory_and_files():
    """Paused it uses no memory and cannot be used; connected to it goes on with its variables; a second pause is no."""
    box = Sandbox.create(timeout=100)
    box.run_code("x = [1, 2, 3]")
    box.files.write("kept.txt", "kept")
    assert control("POST", f"/sandboxes/{box.sandbox_id}/pause", {})[0] == 204
    assert control("POST", f"/sandboxes/{box.sandbox_id}/pause", {})[0] == 409
    assert box.get_info().state == e2b.SandboxState.PAUSED
    assert box.is_running() is False
    raised(e2b.TimeoutException, lambda: box.run_code("x"))
    again = Sandbox.connect(box.sandbox_id, timeout=200)
    assert again.run_code("x").text == "[1, 2, 3]"
    assert again.files.read("kept.txt") == "kept"
    if VERSION >= (2, 50):
        assert again.pause() is True
        assert again.pause() is False
    else:
        again.pause()
    status, resumed = control("POST", f"/sandboxes/{box.sandbox_id}/resume", {"timeout": 60})
    assert status == 201
    assert resumed["sandboxID"] == box.sandbox_id
    assert control("POST", f"/sandboxes/{box.sandbox_id}/resume", {})[0] == 409
    assert box.run_code("x").text == "[1, 2, 3]"
    box.kill()


def files_are_kept_without_the_memory():
    """`memory: false` of pause, connect and snapshots: variables are gone, files are there."""
    if "mode" not in inspect.signature(Sandbox.pause).parameters:
        raise AbsentError("mode")
    box = Sandbox.create(timeout=300)

    def prepare():
        box.run_code("x = 1")
        box.files.write("kept.txt", "kept")

    def began_anew(one):
        assert one.run_code("x", timeout=120).error.name == "NameError"
        assert one.files.read("kept.txt") == "kept"

    at = f"/sandboxes/{box.sandbox_id}"
    prepare()
    assert box.pause(mode="filesystem") is True
    assert control("GET", at)[1]["pauseMode"] == "filesystem"
    assert control("POST", f"/v2{at}/connect", {"timeout": 300})[0] == 201
    began_anew(box)
    prepare()
    assert box.pause(strict=True) is True
    assert control("GET", at)[1]["pauseMode"] == "full"
    Sandbox.connect(box.sandbox_id, timeout=300, on_resume="reboot")
    began_anew(box)
    prepare()
    saved = box.create_snapshot(mode="filesystem")
    assert box.run_code("x").text == "1"
    other = Sandbox.create(saved.snapshot_id, timeout=300)
    began_anew(other)
    other.kill()
    box.kill()
    assert Sandbox.delete_snapshot(saved.snapshot_id) is True


def time_outs_pause_and_use_wakes():
    """lifecycle: on time-out paused, with memory or with files alone; woken by use where that was asked for."""
    box = Sandbox.create(timeout=300, lifecycle={"on_timeout": "pause", "auto_resume": True})
    box.run_code("x = 1")
    at = f"/sandboxes/{box.sandbox_id}"
    assert control("GET", at)[1]["lifecycle"] == {"autoResume": True, "onTimeout": "pause"}
    box.set_timeout(1)
    paused_in_time(at, "full")
    assert box.run_code("x", timeout=120).text == "1"
    assert box.get_info().state == e2b.SandboxState.RUNNING
    box.kill()
    body = {"templateID": "base", "timeout": 1, "autoPause": True, "autoPauseMemory": False}
    _, made = control("POST", "/v2/sandboxes", body)
    at = f"/sandboxes/{made['sandboxID']}"
    assert paused_in_time(at, "filesystem")["lifecycle"] == {"autoResume": False, "onTimeout": "pause"}
    assert control("DELETE", at)[0] == 204


def paused_in_time(at, mode):
    """Wait until a sandbox's time is over and it is saved: what it tells then."""
    deadline = time.monotonic() + 120
    while (told := control("GET", at)[1]).get("pauseMode") != mode:
        assert time.monotonic() < deadline, told
        time.sleep(0.05)
    assert told["state"] == "paused"
    return told


def the_user_and_the_home_are_those_that_programs_know():
    """`user`, in /home/user: for commands, code and files, also of copies and after a pause."""
    box = Sandbox.create(timeout=300)
    box.files.write("noted", "kept")

    def is_at_home(one):
        assert one.commands.run("whoami; pwd; echo $HOME; stat -c %U noted").stdout == HOME
        code = (
            "import getpass, os; print(getpass.getuser(), os.getcwd(), os.path.expanduser('~'), open('noted').read())"
        )
        assert one.run_code(code).logs.stdout == ["user /home/user /home/user kept\n"]
        assert one.files.read("/home/user/noted") == "kept"

    is_at_home(box)
    entry = box.files.get_info("noted")
    assert (entry.path, entry.owner, entry.group) == ("/home/user/noted", "user", "user")
    saved = control("POST", f"/sandboxes/{box.sandbox_id}/snapshots", {})[1]["snapshotID"]
    other = Sandbox.create(saved, timeout=300)
    is_at_home(other)
    copy = control("POST", f"/sandboxes/{box.sandbox_id}/fork", {})[1][0]["sandbox"]["sandboxID"]
    is_at_home(Sandbox.connect(copy))
    assert control("POST", f"/sandboxes/{box.sandbox_id}/pause", {})[0] == 204
    is_at_home(Sandbox.connect(box.sandbox_id))
    for sandbox_id in (box.sandbox_id, other.sandbox_id, copy):
        assert control("DELETE", f"/sandboxes/{sandbox_id}")[0] == 204


def connect_never_shortens():
    """Connecting to one that runs gives it more time, never less; both paths; an unknown one is not found."""
    box = shared()
    before = box.get_info().end_at
    again = Sandbox.connect(box.sandbox_id, timeout=30)
    assert again.get_info().end_at == before
    assert again.run_code("1 + 1").text == "2"
    for path in ("/sandboxes", "/v2/sandboxes"):
        assert control("POST", f"{path}/{box.sandbox_id}/connect", {"timeout": 30})[0] == 200
        assert control("POST", f"{path}/nosuchsandbox/connect", {"timeout": 30})[0] == 404
    raised(e2b.SandboxException, lambda: Sandbox.connect("nosuchsandbox"), "not found")


def forks_have_the_memory_and_their_own_from_then_on():
    """Copies of a live sandbox, each with a token of its own."""
    needs(Sandbox, "fork")
    box = Sandbox.create(timeout=100)
    box.run_code("x = [1]")
    box.files.write("f.txt", "of the source")
    clones = box.fork(count=2)
    assert len({box.sandbox_id, *(clone.sandbox_id for clone in clones)}) == 3
    assert [clone.run_code(f"x.append({n}); x").text for n, clone in enumerate(clones)] == ["[1, 0]", "[1, 1]"]
    assert [clone.files.read("f.txt") for clone in clones] == ["of the source"] * 2
    assert box.run_code("x").text == "[1]"
    status, told = control("POST", f"/sandboxes/{box.sandbox_id}/fork", {"timeout": 900})
    assert (status, [list(one) for one in told]) == (201, [["sandbox"]]), told
    more = Sandbox.connect(told[0]["sandbox"]["sandboxID"], timeout=1)
    assert (more.get_info().end_at - box.get_info().end_at).total_seconds() > 600
    for count in (0, 65, "two"):
        assert control("POST", f"/sandboxes/{box.sandbox_id}/fork", {"count": count})[0] == 400, count
    for one in (box, more, *clones):
        assert one.kill()


def snapshots_are_templates():
    """A snapshot is taken, listed, the template of new sandboxes, and deleted once."""
    needs(Sandbox, "create_snapshot")
    box = Sandbox.create(timeout=100)
    box.run_code("x = 41")
    snapshot = box.create_snapshot()
    found = Sandbox.list_snapshots(sandbox_id=box.sandbox_id).next_items()
    assert [one.snapshot_id for one in found] == [snapshot.snapshot_id]
    other = Sandbox.create(snapshot.snapshot_id, timeout=100, envs={"NEW": "n"})
    assert other.run_code("x + 1").text == "42"
    assert other.run_code("import os; os.environ['NEW']").text == "n"
    status, named = control("POST", f"/sandboxes/{box.sandbox_id}/snapshots", {"name": "prepared"})
    assert (status, named["names"]) == (201, ["prepared"])
    for name, count in (("prepared", 1), (snapshot.snapshot_id, 1), ("other", 0)):
        assert len(control("GET", f"/snapshots?name={name}&sandboxID={box.sandbox_id}")[1]) == count
    pages = [httpx.get(f"{API}/snapshots?sandboxID={box.sandbox_id}&limit=1", headers={"X-API-KEY": KEY})]
    following = {"sandboxID": box.sandbox_id, "nextToken": pages[0].headers["x-next-token"]}
    pages.append(httpx.get(f"{API}/snapshots", params=following, headers={"X-API-KEY": KEY}))
    assert [one["snapshotID"] for page in pages for one in page.json()] == [named["snapshotID"], snapshot.snapshot_id]
    assert "x-next-token" not in pages[1].headers
    third = Sandbox.create("prepared", timeout=100)
    assert third.run_code("x").text == "41"
    for one in (box, other, third):
        one.kill()
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is True
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is False
    assert Sandbox.delete_snapshot(named["snapshotID"]) is True


def metrics_are_measured():
    """Memory and processors that it really uses; of several at once, too."""
    box = shared()
    box.run_code("held = bytearray(64 * 2**20)")
    first = box.get_metrics()[-1]
    assert first.mem_used > 64 * 2**20
    assert first.mem_used < first.mem_total
    assert 0 < getattr(first, "mem_cache", 1) < first.mem_used
    box.files.write("bulk", os.urandom(2**22))
    grown = box.get_metrics()[-1].disk_used - first.disk_used
    assert 2**22 <= grown < 2**24, (grown, first.disk_used)
    box.files.remove("bulk")
    past = control("GET", f"/sandboxes/{box.sandbox_id}/metrics?end={int(time.time()) - 60}")
    assert past == (200, [])
    box.run_code("import time\nend = time.time() + 0.5\nwhile time.time() < end: pass")
    assert box.get_metrics()[-1].cpu_used_pct > 0
    box.run_code("del held")
    _, several = control("GET", f"/sandboxes/metrics?sandbox_ids={box.sandbox_id}")
    assert set(several["sandboxes"]) == {box.sandbox_id}
    figures = {"timestamp", "timestampUnix", "cpuCount", "cpuUsedPct", "memUsed", "memTotal", "memCache"}
    (now,) = control("GET", f"/sandboxes/{box.sandbox_id}/metrics")[1]
    assert set(now) == figures | {"diskUsed", "diskTotal"}
    assert abs(now["timestampUnix"] - time.time()) < 60


def logs_tell_what_ran():
    """By the new path and the old one."""
    box = shared()
    box.commands.run("true # for the log")
    _, new = control("GET", f"/v2/sandboxes/{box.sandbox_id}/logs")
    _, old = control("GET", f"/sandboxes/{box.sandbox_id}/logs")
    for entries in (new["logs"], old["logEntries"]):
        ours = [entry for entry in entries if "for the log" in entry["fields"]["cmd"]]
        assert [entry["message"] for entry in ours] == ["process started", "process ended"]
        assert [(entry["level"], entry["fields"].get("exit_code")) for entry in ours] == [("info", None), ("info", "0")]
        assert ours[0]["timestamp"] <= ours[1]["timestamp"]
    raised(e2b.CommandExitException, lambda: box.commands.run("exit 7 # for the log"))
    at = f"/v2/sandboxes/{box.sandbox_id}/logs"
    assert [one["fields"]["exit_code"] for one in control("GET", f"{at}?level=warn&search=for%20the")[1]["logs"]] == [
        "7"
    ]
    assert control("GET", f"{at}?search=of%20nothing")[1]["logs"] == []
    everything = control("GET", at)[1]["logs"]
    assert control("GET", f"{at}?direction=backward&limit=2")[1]["logs"] == everything[:-3:-1]
    future = round(time.time() + 60) * 1000
    assert control("GET", f"{at}?cursor={future}")[1]["logs"] == []
    assert len(control("GET", f"{at}?cursor={future}&direction=backward")[1]["logs"]) == len(everything)
    assert control("GET", f"/sandboxes/{box.sandbox_id}/logs?start={future}")[1]["logEntries"] == []
    assert len(control("GET", f"/sandboxes/{box.sandbox_id}/logs?limit=1")[1]["logEntries"]) == 1
    for wrong in ("level=loud", "direction=up", "cursor=now", "limit=-1"):
        assert control("GET", f"{at}?{wrong}")[0] == 400, wrong


def hosts_are_reached_that_are_named_and_that_the_operator_allows():
    """None at first, whatever clients say by default; what is allowed can be changed, and nothing else is reached."""
    box, path = shared(), f"/sandboxes/{shared().sandbox_id}"
    assert box.get_info().allow_internet_access is False
    assert box.commands.run("echo ${HTTPS_PROXY:-none}").stdout == "none\n"
    assert control("PUT", f"{path}/network", {"allowOut": ["elsewhere.example"]})[0] == 400
    assert control("PUT", f"{path}/network", {"allowOut": ["a.example.com"], "denyOut": ["0.0.0.0/0"]})[0] == 204
    closed = {"denyOut": ["0.0.0.0/0"], "allowPublicTraffic": False}
    assert control("GET", path)[1]["network"] == {"allowOut": ["a.example.com"], **closed}
    ask = "import urllib.request as r\ntry: r.build_opener().open('http://{}/')\nexcept r.HTTPError as e: print(e.code)"
    assert "".join(box.run_code(ask.format("b.example.com")).logs.stdout) == "403\n"
    excepted = {"allowOut": ["*.example.com"], "denyOut": ["0.0.0.0/0", "a.example.com"]}
    assert control("PUT", f"{path}/network", excepted)[0] == 204
    assert control("GET", path)[1]["network"] == {**closed, **excepted}
    assert "".join(box.run_code(ask.format("a.example.com")).logs.stdout) == "403\n"
    for how in ({"denyOut": ["0.0.0.0/0"]}, {"allow_internet_access": False}, {"allow_internet_access": True}, {}):
        assert control("PUT", f"{path}/network", excepted)[0] == 204
        assert control("PUT", f"{path}/network", how)[0] == 204
        assert control("GET", path)[1]["network"]["allowOut"] == [], how


def headers_are_added_for_hosts_that_are_allowed():
    """`rules` of create and of a change: for hosts that are named, never told again, and not there inside."""
    rules = {"a.example.com": [{"transform": {"headers": {"Authorization": "Bearer secret"}}}]}
    asked = {"templateID": "base", "timeout": 100, "network": {"allowOut": ["a.example.com"], "rules": rules}}
    status, made = control("POST", "/v2/sandboxes", asked)
    assert status == 201, made
    path = f"/sandboxes/{made['sandboxID']}"
    said = json.dumps(control("GET", path)[1])
    assert "a.example.com" in said
    assert "secret" not in said
    box = Sandbox.connect(made["sandboxID"])
    assert "secret" not in box.commands.run("env; cat /proc/*/environ 2>/dev/null || true").stdout
    for wrong in (
        {"allowOut": ["b.example.com"], "rules": rules},
        {"allowOut": ["*.example.com"], "rules": {"*.example.com": rules["a.example.com"]}},
    ):
        assert control("PUT", f"{path}/network", wrong)[0] == 400, wrong
    assert control("PUT", f"{path}/network", {"allowOut": ["a.example.com"], "rules": rules})[0] == 204
    box.kill()


def ports_are_everybodys_where_that_is_asked_for():
    """`allowPublicTraffic`, which this server's operator allows; without it, and for files and code, tokens count."""
    at = urllib.parse.urlsplit(API)
    for asked, status in (({}, 401), ({"allowPublicTraffic": False}, 401), ({"allowPublicTraffic": True}, 200)):
        _, made = control("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 100, "network": asked})
        told = control("GET", f"/sandboxes/{made['sandboxID']}")[1]["network"]
        assert told["allowPublicTraffic"] == asked.get("allowPublicTraffic", False)
        box = Sandbox.connect(made["sandboxID"])
        box.run_code(
            "import http.server, threading\n"
            "web = http.server.HTTPServer(('127.0.0.1', 3003), http.server.SimpleHTTPRequestHandler)\n"
            "threading.Thread(target=web.serve_forever, daemon=True).start()"
        )
        bare = {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "3003"}
        assert httpx.get(API + "/", headers=bare).status_code == status, asked
        by_host = {"Host": f"3003-{box.sandbox_id}.sandboxes.example"}
        assert httpx.get(f"{at.scheme}://{at.netloc}/", headers=by_host).status_code == status, asked
        for port, path in (("49983", "/envs"), ("49999", "/contexts")):
            assert httpx.get(API + path, headers={**bare, "E2b-Sandbox-Port": port}).status_code == 401
        assert box.kill()


def name_servers_and_a_proxy_are_used_that_the_operator_allows():
    """Neither is a way around what may be reached; their places are told again, and no password."""
    box = Sandbox.create(timeout=100)
    path, hosts = f"/sandboxes/{box.sandbox_id}", {"allowOut": ["a.example.com"], "denyOut": ["0.0.0.0/0"]}
    for more in (
        {"dnsServers": ["8.8.8.8"]},
        {"dnsServers": ["10.0.0.1"]},
        {"dnsServers": ["dns.example.com"]},
        {"egressProxy": {"address": "x"}},
        {"egressProxy": {"address": "elsewhere.example:1080"}},
        {"egressProxy": {"address": "p.example.com:1080", "password": "alone"}},
    ):
        status, error = control("PUT", f"{path}/network", {**hosts, **more})
        assert status == 400, (more, error)
    proxy = {"address": "p.example.com:1080", "username": "ann", "password": "of the proxy"}
    ways = {"dnsServers": ["198.41.0.4"], "egressProxy": proxy}
    assert control("PUT", f"{path}/network", {**hosts, **ways})[0] == 204
    told = control("GET", path)[1]["network"]
    shown = {"address": "p.example.com:1080", "username": "ann"}
    assert told == {**hosts, **ways, "egressProxy": shown, "allowPublicTraffic": False}, told
    # Nobody answers for that name, so nothing is reached, by no other way either.
    ask = "import urllib.request as r\ntry: r.build_opener().open('http://a.example.com/')\n"
    ask += "except r.HTTPError as e: print(e.headers['warmcell-refused'])"
    assert "no address" in "".join(box.run_code(ask).logs.stdout)
    box.kill()


def ports_speak_tls_and_see_the_host_that_is_asked_for():
    """A server with a certificate of its own is reached, and sees the host that was wanted; others go without TLS."""
    network = {"httpsPorts": [3443], "maskRequestHost": "${PORT}-app.example.com"}
    for wrong in ({"httpsPorts": [49983]}, {"maskRequestHost": "two words"}, {"maskRequestHost": "x\r\ny: z"}):
        assert control("POST", "/v2/sandboxes", {"templateID": "base", "network": wrong})[0] == 400, wrong
    status, made = control("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 300, "network": network})
    assert status == 201, made
    box = Sandbox.connect(made["sandboxID"])
    told = control("GET", f"/sandboxes/{box.sandbox_id}")[1]["network"]
    assert {name: told[name] for name in network} == network
    box.run_code(
        "import datetime, http.server, ssl, threading\n"
        "from cryptography import x509\n"
        "from cryptography.hazmat.primitives import hashes, serialization\n"
        "from cryptography.hazmat.primitives.asymmetric import ec\n"
        "key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)\n"
        "name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'nobody')])\n"
        "made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())\n"
        "made = made.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(1))\n"
        "pem = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)\n"
        "PEM, NONE = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()\n"
        "pem += key.private_bytes(serialization.Encoding.PEM, PEM, NONE)\n"
        "open('/tmp/own.pem', 'wb').write(pem)\n"
        "class Page(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        "        self.wfile.write(f\"{self.headers['Host']}|{self.headers['Origin']}\".encode())\n"
        "context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n"
        "context.load_cert_chain('/tmp/own.pem')\n"
        "for port in (3443, 3080):\n"
        "    web = http.server.ThreadingHTTPServer(('127.0.0.1', port), Page)\n"
        "    if port == 3443: web.socket = context.wrap_socket(web.socket, server_side=True)\n"
        "    threading.Thread(target=web.serve_forever, daemon=True).start()"
    )
    answer = envd(box, "GET", "/", port=3443, headers={"Origin": "http://x"})
    assert answer.text == "3443-app.example.com|https://3443-app.example.com", answer.text
    answer = envd(box, "GET", "/", port=3080, headers={"Origin": "http://x"})
    assert answer.text == "3080-app.example.com|http://3080-app.example.com", answer.text
    box.kill()


def templates_tags_volumes_and_secrets_say_that_they_are_not_there():
    """501 in E2B's form, with what to do instead."""
    for method, path in (
        ("POST", "/v3/templates"),
        ("GET", "/templates"),
        ("GET", "/v2/templates"),
        ("GET", "/default-templates"),
        ("GET", "/templates/aliases/x"),
        ("POST", "/v2/templates/x/builds/y"),
        ("POST", "/templates/tags"),
        ("DELETE", "/templates/tags"),
        ("GET", "/templates/x/tags"),
        ("GET", "/templates/x"),
        ("PATCH", "/templates/x"),
        ("PATCH", "/v2/templates/x"),
        ("GET", "/templates/x/files/h"),
        ("GET", "/templates/x/builds/y/status"),
        ("GET", "/templates/x/builds/y/logs"),
        ("GET", "/templates/x/tags/count"),
        ("GET", "/templates/x/tags/exists"),
        ("GET", "/templates/x/tags/groups"),
        ("GET", "/templates/x/tags/y/assignments"),
        ("GET", "/volumes"),
        ("POST", "/volumes"),
        ("GET", "/volumes/x"),
        ("DELETE", "/volumes/x"),
        ("GET", "/secrets"),
        ("POST", "/secrets"),
        ("GET", "/secrets/x"),
        ("POST", "/secrets/x"),
        ("DELETE", "/secrets/x"),
    ):
        status, error = control(method, path, {} if method == "POST" else None)
        assert (status, error["code"], error["error_code"]) == (501, 501, "unsupported"), (method, path)
        assert "not part of Warmcell" in error["message"]


# --- processes -------------------------------------------------------------------------------------------------------


def commands_run():
    """Output by stream and by callback, exit codes, directory and environment."""
    said = []
    done = shared().commands.run(
        "echo out; echo err >&2; pwd; echo $SAID $MORE", cwd="/tmp", envs={"MORE": "more"}, on_stdout=said.append
    )
    assert (done.stdout, done.stderr, done.exit_code) == ("out\n/tmp\nto all more\n", "err\n", 0)
    assert "".join(said) == done.stdout
    error = raised(e2b.CommandExitException, lambda: shared().commands.run("echo no >&2; exit 3"))
    assert (error.exit_code, error.stderr) == (3, "no\n")


def commands_take_input():
    """Bytes, streams of them, and their end."""
    commands = shared().commands
    # `read` takes no byte more than its line, as `head` would from a pipe.
    running = commands.run("read line; echo $line; cat", background=True, stdin=True)
    assert running.pid in [one.pid for one in commands.list()]
    commands.send_stdin(running.pid, "first\n")
    if hasattr(commands, "stream_input"):
        commands.stream_input(running.pid, ["second\n", "third\n"])
    else:
        commands.send_stdin(running.pid, "second\nthird\n")
    if hasattr(commands, "close_stdin"):
        commands.close_stdin(running.pid)
        assert running.wait().stdout == "first\nsecond\nthird\n"
    else:
        assert running.kill()
    if VERSION >= (2, 50):  # Without input a command reads its end at once.
        assert commands.run("cat; echo read", timeout=30).stdout == "read\n"


def commands_are_found_again_and_killed():
    """A command outlives its caller; who connects hears what it says from then on; killed twice is no."""
    commands = shared().commands
    running = commands.run("read line; echo said $line; sleep 600", background=True, stdin=True)
    running.disconnect()
    again = commands.connect(running.pid)
    commands.send_stdin(running.pid, "this\n")
    stdout = next(out for out, _, _ in again if out)
    assert stdout == "said this\n"
    assert commands.kill(running.pid) is True
    assert commands.kill(running.pid) is False
    assert running.pid not in [one.pid for one in commands.list()]
    raised(e2b.NotFoundException, lambda: commands.connect(running.pid))


def rpc(box, method, message, **headers):
    """A unary call that the package has no function for."""
    answer = envd(box, "POST", f"/process.Process/{method}", json=message, headers=headers)
    return answer.status_code, answer.json()


def processes_are_chosen_by_tag_and_end_by_signal():
    """SIGTERM to the one with a tag; what it says as it ends is heard by whoever has connected by that tag."""
    box, tag = shared(), {"tag": "chosen"}
    headers = {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "49983", "X-Access-Token": box._envd_access_token}
    headers["Content-Type"] = "application/connect+json"
    script = "trap 'echo ended; exit 7' TERM; echo began; while :; do read -t 1 line; done"
    message = json.dumps({"process": {"cmd": "bash", "args": ["-c", script]}, "tag": "chosen", "stdin": True}).encode()
    content = b"\0" + len(message).to_bytes(4, "big") + message
    assert rpc(box, "SendSignal", {"process": tag, "signal": "SIGNAL_SIGTERM"})[0] == 404
    with httpx.stream("POST", f"{API}/process.Process/Start", headers=headers, content=content, timeout=60) as answer:
        told = b""
        for piece in answer.iter_raw():
            told += piece
            if b'"stdout":"YmVnYW4K"' in told and b"SENT" not in told:
                listed = rpc(box, "List", {})[1]["processes"]
                assert [one["tag"] for one in listed if "tag" in one] == ["chosen"]
                assert rpc(box, "SendSignal", {"process": tag, "signal": "SIGNAL_SIGTERM"}) == (200, {})
                told = b"SENT"
    assert b'"stdout":"ZW5kZWQK"' in told
    assert b'"exitCode":7' in told


def calls_of_strangers_are_unauthenticated():
    """By Connect's code, and by the package's exception."""
    status, error = rpc(shared(), "List", {}, **{"X-Access-Token": "wcs_.0"})
    assert (status, error["code"]) == (401, "unauthenticated")
    other = Sandbox.create(timeout=60)
    status, error = rpc(shared(), "List", {}, **{"X-Access-Token": other._envd_access_token})
    assert (status, error["code"]) == (401, "unauthenticated")
    assert other.kill()


def commands_end_with_their_time():
    """The client's time-out is the command's."""
    box = shared()
    kinds = e2b.TimeoutException if VERSION >= (2, 50) else (e2b.TimeoutException, httpcore.ReadTimeout)
    raised(kinds, lambda: box.commands.run("sleep 601", timeout=1))
    deadline = time.monotonic() + 60
    while box.commands.run("ps -eo args | grep -c '[s]leep 601' || true").stdout.strip() != "0":
        assert time.monotonic() < deadline


def terminals_have_a_size():
    """A PTY, what is typed, another size, and its end."""
    box = shared()
    said = []
    terminal = box.pty.create(e2b.PtySize(rows=30, cols=90))
    box.pty.send_stdin(terminal.pid, b"stty size; read x\n")
    for _, _, data in terminal:
        said.append(data or b"")
        if b"30 90" in b"".join(said):
            break
    box.pty.resize(terminal.pid, e2b.PtySize(rows=31, cols=91))
    box.pty.send_stdin(terminal.pid, b"go\nstty size; exit\n")
    for _, _, data in terminal:
        said.append(data or b"")
    assert b"31 91" in b"".join(said)


def other_users_are_refused():
    """A sandbox has one."""
    box = shared()
    assert box.commands.run("true", user="user").exit_code == 0
    raised(e2b.InvalidArgumentException, lambda: box.commands.run("true", user="root"), "root")


# --- MCP -------------------------------------------------------------------------------------------------------------

ADDING = """
import os
from mcp.server.mcpserver import MCPServer

server = MCPServer("adding")


@server.tool()
def add(a: int, b: int) -> str:
    return f"{a + b} {os.environ['API_KEY']}"


server.run("stdio")
"""


def servers_of_mcp_are_behind_one_gateway():
    """`mcp` of create: servers in the sandbox, cloned, installed and started; its address opens by its token alone."""
    if "mcp" not in inspect.signature(Sandbox.create).parameters:
        raise AbsentError("mcp")
    prepared = Sandbox.create(timeout=300)
    prepared.files.write("adding/server.py", ADDING)
    prepared.commands.run(
        "cd adding && git init -q . && git add -A && git -c user.name=a -c user.email=a@b commit -qm first"
    )
    snapshot = control("POST", f"/sandboxes/{prepared.sandbox_id}/snapshots", {})[1]["snapshotID"]
    prepared.kill()
    # The sandbox reaches no GitHub: its git finds the repository where the snapshot has it.
    insteads = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "url.file:///home/user/adding.insteadOf"}
    insteads["GIT_CONFIG_VALUE_0"] = "https://github.com/some/adding"
    adding = {"installCmd": "touch ~/installed", "runCmd": "python server.py", "apiKey": "key"}
    box = Sandbox.create(snapshot, timeout=300, envs=insteads, mcp={"github/some/adding": adding})
    assert box.files.exists("installed")
    token = box.get_mcp_token()
    assert Sandbox.connect(box.sandbox_id).get_mcp_token() == token
    assert f"50005-{box.sandbox_id}" in box.get_mcp_url()

    def ask(method, shown=token, port=50005, **params):
        headers = {
            "E2b-Sandbox-Id": box.sandbox_id,
            "E2b-Sandbox-Port": str(port),
            "MCP-Protocol-Version": "2025-06-18",
        }
        headers |= {"Authorization": f"Bearer {shown}", "Accept": "application/json, text/event-stream", **session}
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return httpx.post(API + "/mcp", json=message, headers=headers, timeout=60)

    session = {}
    who = {"name": "scenario", "version": "1"}
    answer = ask("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo=who)
    assert answer.status_code == 200, answer.text
    session["Mcp-Session-Id"] = answer.headers["Mcp-Session-Id"]
    assert '"add"' in ask("tools/list").text
    assert "42 key" in ask("tools/call", name="add", arguments={"a": 40, "b": 2}).text
    for wrong in ("wrong", box._envd_access_token):
        assert ask("tools/list", shown=wrong).status_code == 401
    assert ask("tools/list", port=50006).status_code == 401
    raised(e2b.SandboxException, lambda: box.files.read("/etc/hostname", user="root"), "root")
    box.kill()
    # A gateway that cannot begin says why, and its sandbox is gone.
    before = {one["sandboxID"] for one in control("GET", "/v2/sandboxes")[1]}
    raised(e2b.SandboxException, lambda: Sandbox.create(mcp={"exa": {"apiKey": "k"}}), "mcp-server-exa")
    raised(e2b.SandboxException, lambda: Sandbox.create(mcp={"it": {"runCmd": "echo no"}}), "did not start")
    until = time.monotonic() + 10
    while left := {one["sandboxID"] for one in control("GET", "/v2/sandboxes")[1]} - before:
        if VERSION < (2, 50):  # Older ones leave it.
            break
        assert time.monotonic() < until, left
        time.sleep(0.1)
    for one in left:
        control("DELETE", f"/sandboxes/{one}")
    assert control("POST", "/v2/sandboxes", {"templateID": "base", "mcp": "exa"})[0] == 400


# --- files -----------------------------------------------------------------------------------------------------------


def files_are_written_and_read():
    """Text and bytes, large ones, parents made, relative to the home; what is not there is not found."""
    files = shared().files
    written = files.write("deep/er/a.txt", "héllo")
    assert written.path.endswith("/deep/er/a.txt")
    assert files.read("deep/er/a.txt") == files.read(written.path) == "héllo"
    assert files.read("/home/user/deep/er/a.txt") == "héllo"
    assert shared().commands.run("cat deep/er/a.txt", cwd="/home/user").stdout == "héllo"
    large = os.urandom(3_000_000)
    files.write("large", large)
    assert files.read("large", format="bytes") == large
    assert b"".join(files.read("large", format="stream")) == large
    files.write("empty", b"")
    assert files.read("empty") == ""
    raised(e2b.NotFoundException, lambda: files.read("nothing"), "nothing")


def files_are_uploaded_in_every_form():
    """Multipart with several, as they are, compressed."""
    box = shared()
    files = box.files
    written = files.write_files([{"path": "m/1", "data": "one"}, {"path": "m/2", "data": b"two"}])
    assert [one.name for one in written] == ["1", "2"]
    assert (files.read("m/1"), files.read("m/2")) == ("one", "two")
    if "gzip" in inspect.signature(files.write).parameters:
        files.write("m/3", "three" * 1000, gzip=True)
        assert files.read("m/3", gzip=True) == "three" * 1000
    if "use_octet_stream" in inspect.signature(files.write).parameters:
        files.write("m/4", "four", use_octet_stream=True)
        assert files.read("m/4") == "four"
    assert envd(box, "POST", "/files?path=m/5", content=b"five").status_code == 200
    assert files.read("m/5") == "five"
    junk = {"Content-Type": "multipart/form-data; boundary=x"}
    assert envd(box, "POST", "/files", content=b"junk", headers=junk).status_code == 400
    gzipped = {"Content-Encoding": "gzip"}
    assert envd(box, "POST", "/files?path=x", content=b"junk", headers=gzipped).status_code == 400


def parts_become_one_file():
    """Uploaded one by one, joined in order, and gone then; a part that is not there leaves all as it was."""
    box = shared()
    for name in ("1", "2"):
        box.files.write(f"parts/{name}", f"part {name};")
    asked = {"source_paths": ["parts/1", "parts/2", "parts/1"], "destination": "joined/whole"}
    joined = envd(box, "POST", "/files/compose", json=asked)
    assert (joined.status_code, joined.json()["name"], joined.json()["type"]) == (200, "whole", "file"), joined.text
    assert box.files.read("joined/whole") == "part 1;part 2;part 1;"
    assert box.files.list("parts") == []
    assert envd(box, "POST", "/files/compose", json=asked).status_code == 404
    assert box.files.read("joined/whole") == "part 1;part 2;part 1;"
    asked["source_paths"] = ["joined/whole"]
    for wrong in ({}, {**asked, "destination": "joined/whole"}, {**asked, "source_paths": ["joined"]}):
        assert envd(box, "POST", "/files/compose", json=wrong).status_code in (400, 409), wrong
    assert envd(box, "POST", "/files/compose", json={**asked, "username": "root"}).status_code == 400
    assert box.files.exists("joined/whole")


def files_keep_what_is_noted_on_them():
    """As metadata, told wherever they are told; another upload has its own. It is in their extended attributes."""
    box = shared()
    noted = {"X-Metadata-Author": "ann", "X-Metadata-purpose": "a b"}
    written = envd(box, "POST", "/files?path=noted", content=b"x", headers=noted)
    assert written.json()[0]["metadata"] == {"author": "ann", "purpose": "a b"}, written.text
    code = "import os; {n: os.getxattr('noted', n).decode() for n in sorted(os.listxattr('noted'))}"
    assert box.run_code(code).text == "{'user.e2b.author': 'ann', 'user.e2b.purpose': 'a b'}"
    assert envd(box, "POST", "/files?path=noted", content=b"x", headers={"X-Metadata-a": "b" * 1025}).status_code == 400
    if "metadata" in inspect.signature(box.files.write).parameters:
        info = box.files.write("noted", "y", metadata={"Version": "2"})
        assert info.metadata == {"version": "2"}
        assert box.files.get_info("noted").metadata == {"version": "2"}
        assert box.files.rename("noted", "noted-too").metadata == {"version": "2"}
        box.files.write("noted-too", "z")
        assert box.files.get_info("noted-too").metadata is None


def signed_urls_open_one_file():
    """Read and write without a header, until their time is over, and nothing but that."""
    box = shared()
    box.files.write("signed é.txt", "signed")
    url = box.download_url("signed é.txt", use_signature_expiration=60)
    assert httpx.get(url).text == "signed"
    assert httpx.get(box.download_url("signed é.txt")).text == "signed"
    assert httpx.get(url.replace("signed", "other")).status_code == 401
    assert httpx.post(url, files={"file": b"x"}).status_code == 401
    assert httpx.get(box.download_url("signed é.txt", use_signature_expiration=-5)).status_code == 401
    answer = httpx.post(box.upload_url("up.txt"), files={"file": ("any", b"up")})
    assert answer.json()[0]["name"] == "up.txt"
    assert box.files.read("up.txt") == "up"


def room_that_is_used_up_is_told():
    """507, as the exception that the package has for it; what was there is there, and nothing half written."""
    box = Sandbox.create(timeout=100)
    box.files.write("/dev/shm/kept", "kept")
    box.commands.run("fallocate -l $(df --output=avail -B1 /dev/shm | tail -1) /dev/shm/fill")
    answer = envd(box, "POST", "/files?path=/dev/shm/kept", content=bytes(2**20))
    assert (answer.status_code, answer.json()["code"]) == (507, 507), answer.text
    raised(e2b.NotEnoughSpaceException, lambda: box.files.write("/dev/shm/more", bytes(2**20)))
    assert box.files.read("/dev/shm/kept") == "kept"
    assert sorted(entry.name for entry in box.files.list("/dev/shm")) == ["fill", "kept"]
    box.kill()


def directories_are_made_listed_moved_and_removed():
    """stat, exists, make_dir, list with depth, rename, remove; what is there already is told."""
    files = shared().files
    assert files.make_dir("d/sub") is True
    assert files.make_dir("d/sub") is False
    files.write("d/sub/f", "12345")
    assert sorted(entry.name for entry in files.list("d")) == ["sub"]
    assert sorted(entry.path.rpartition("/d/")[2] for entry in files.list("d", depth=2)) == ["sub", "sub/f"]
    info = files.get_info("d/sub/f")
    assert (info.name, info.type, info.size, info.permissions) == ("f", e2b.FileType.FILE, 5, "-rw-r--r--")
    assert files.get_info("d").type == e2b.FileType.DIR
    shared().commands.run("ln -s f link", cwd="d/sub")
    link = files.get_info("d/sub/link")
    kind = e2b.FileType.SYMLINK if VERSION >= (2, 52) else e2b.FileType.FILE  # older ones tell what it leads to
    assert (link.type, link.symlink_target) == (kind, info.path)
    assert sorted(entry.name for entry in files.list("d/sub")) == ["f", "link"]
    moved = files.rename("d/sub/f", "d/g")
    assert moved.path.endswith("/d/g")
    assert files.exists("d/g") is True
    assert files.exists("d/sub/f") is False
    files.remove("d")
    assert files.exists("d") is False
    files.remove("d")
    raised(e2b.NotFoundException, lambda: files.list("d"))


def watchers_tell_changes():
    """Polled and as they come; recursively; one of what is not there is refused."""
    box = shared()
    box.files.make_dir("w/old")
    known = inspect.signature(box.files.watch_dir).parameters
    mounts = {"allow_network_mounts": True} if "allow_network_mounts" in known else {}
    watcher = box.files.watch_dir("w", recursive=True, **mounts)
    box.files.write("w/a", "1")
    box.files.make_dir("w/new")
    box.files.write("w/new/b", "2")
    box.files.remove("w/a")
    wanted = {("create", "a"), ("write", "a"), ("create", "new"), ("create", "new/b"), ("remove", "a")}
    seen = set()
    deadline = time.monotonic() + 60
    while not wanted <= seen:
        assert time.monotonic() < deadline, seen
        seen |= {(event.type.value, event.name) for event in watcher.get_new_events()}
    watcher.stop()
    raised(e2b.SandboxException, lambda: box.files.watch_dir("nowhere"))

    async def as_they_come():
        one = await AsyncSandbox.connect(box.sandbox_id)
        heard = asyncio.Event()
        handle = await one.files.watch_dir("w", lambda event: heard.set() if event.name == "c" else None)
        await one.files.write("w/c", "3")
        await asyncio.wait_for(heard.wait(), 60)
        await handle.stop()

    asyncio.run(as_they_come())


def watchers_tell_names_rights_and_what_a_file_is():
    """RENAME and CHMOD, and with `include_entry` the file itself: owner, group, time; none of what is gone."""
    box = shared()
    box.files.write("v/a", "12345")
    about = {"include_entry": True} if "include_entry" in inspect.signature(box.files.watch_dir).parameters else {}
    watcher = box.files.watch_dir("v", **about)
    box.files.rename("v/a", "v/b")
    box.commands.run("chmod 600 v/b")
    seen = []
    deadline = time.monotonic() + 60
    while ("chmod", "b") not in [(event.type.value, event.name) for event in seen]:
        assert time.monotonic() < deadline, seen
        seen += watcher.get_new_events()
    watcher.stop()
    assert ("rename", "a") in [(event.type.value, event.name) for event in seen]
    info = box.files.get_info("v/b")
    who = box.run_code("import getpass, grp, os; getpass.getuser() + ' ' + grp.getgrgid(os.getgid()).gr_name").text
    assert f"{info.owner} {info.group}" == who
    assert abs(info.modified_time.timestamp() - time.time()) < 600
    if about:
        entries = {event.type.value: event.entry for event in seen}
        assert entries["rename"] is None
        assert (entries["chmod"].permissions, entries["chmod"].size) == ("-rw-------", 5)
        assert (entries["chmod"].path, entries["chmod"].owner) == (info.path, info.owner)


# --- code ------------------------------------------------------------------------------------------------------------


def code_keeps_its_variables_and_shows_results():
    """Results in their formats, prints as they come, the error with its traceback, the count."""
    box = shared()
    out, results = [], []
    done = box.run_code(
        "import sys\nfrom IPython.display import HTML, display\nprint('out')\nprint('err', file=sys.stderr)\n"
        "display(HTML('<b>x</b>'))\nvalue = 20\nvalue + 1",
        on_stdout=lambda message: out.append(message),
        on_result=results.append,
    )
    assert done.text == "21"
    assert (done.logs.stdout, done.logs.stderr) == (["out\n"], ["err\n"])
    assert (out[0].line, out[0].timestamp > 0) == ("out\n", True)
    assert [result.is_main_result for result in results] == [False, True]
    assert results[0].html == "<b>x</b>"
    failed = box.run_code("value / 0")
    assert (failed.error.name, failed.error.value) == ("ZeroDivisionError", "division by zero")
    assert "ZeroDivisionError" in failed.error.traceback
    assert failed.execution_count > done.execution_count
    assert box.run_code("value").text == "20"
    assert box.run_code("import os; os.environ['ONCE']", envs={"ONCE": "1"}).text == "1"


def results_come_in_every_format():
    """Text, HTML, Markdown, SVG, PNG, JPEG, PDF, LaTeX, JSON, JavaScript, and whatever else there is as `extra`."""
    pixel = "iVBORw0KGgo="
    bundle = {
        "text/plain": "'bare'",
        "text/html": "<b>h</b>",
        "text/markdown": "*m*",
        "image/svg+xml": "<svg/>",
        "image/png": pixel,
        "image/jpeg": pixel,
        "application/pdf": pixel,
        "text/latex": "$l$",
        "application/json": {"j": [1]},
        "application/javascript": "alert(1)",
        "application/x-other": "other",
    }
    done = shared().run_code(f"from IPython.display import display\ndisplay({bundle!r}, raw=True)")
    (result,) = done.results
    assert (result.text, result.html, result.markdown, result.svg) == ("bare", "<b>h</b>", "*m*", "<svg/>")
    assert (result.png, result.jpeg, result.pdf, result.latex) == (pixel, pixel, pixel, "$l$")
    assert (result.json, result.javascript) == ({"j": [1]}, "alert(1)")
    assert result.extra == {"application/x-other": "other"}
    assert not result.is_main_result


def tables_and_figures_come_with_their_data():
    """`data` of a DataFrame, `chart` of a figure beside its picture; code sees that it is in such a sandbox."""
    box = shared()
    assert box.run_code("import os; os.environ['E2B_SANDBOX']").text == "true"
    table = box.run_code("import pandas as pd\npd.DataFrame({'a': [1, 2], 'b': ['x', None]})").results[0]
    assert table.data == {"a": [1, 2], "b": ["x", None]}
    assert "<table" in table.html
    drawn = box.run_code(
        "import matplotlib.pyplot as plt\nplt.bar(['x', 'y'], [1, 2], label='g')\nplt.title('T')\n"
        "plt.xlabel('size (m)')\nplt.show()",
        timeout=120,
    )
    assert drawn.error is None, drawn.error
    (figure,) = drawn.results
    assert figure.png.startswith("iVBOR")
    assert (figure.chart.type.value, figure.chart.title, figure.chart.x_unit) == ("bar", "T", "m")
    assert [(one.label, one.group, one.value) for one in figure.chart.elements] == [("x", "g", 1), ("y", "g", 2)]


def silence_is_told_while_code_runs():
    """A keepalive every five seconds, so that nobody takes it for gone."""
    began = time.monotonic()
    lines = envd(
        shared(), "POST", "/execute", port=49999, json={"code": "import time; time.sleep(6)"}
    ).text.splitlines()
    kinds = [json.loads(line)["type"] for line in lines]
    assert "keepalive" in kinds, kinds
    assert kinds.index("keepalive") < kinds.index("end_of_execution") == len(kinds) - 1
    assert time.monotonic() - began >= 6


def streams_say_that_they_are_there():
    """As often as Keepalive-Ping-Interval asks for."""
    message = json.dumps({"process": {"cmd": "sleep", "args": ["1.5"]}}).encode()
    headers = {"Content-Type": "application/connect+json", "Keepalive-Ping-Interval": "1"}
    content = b"\0" + len(message).to_bytes(4, "big") + message
    told = envd(shared(), "POST", "/process.Process/Start", content=content, headers=headers).content
    assert b'{"event":{"keepalive":{}}}' in told, told


def contexts_have_variables_of_their_own():
    """Made, listed, restarted, removed; an unknown one is not found."""
    needs(Sandbox, "create_code_context")
    box = shared()
    context = box.create_code_context(cwd="/tmp")
    assert (context.language, context.cwd) == ("python", "/tmp")
    if hasattr(box, "list_code_contexts"):
        listed = box.list_code_contexts()
        assert {one.cwd for one in listed} == {"/tmp", "/home/user"}
        assert {one.language for one in listed} >= {"python", "javascript"}
    box.run_code("mine = 1", context=context)
    assert box.run_code("mine").error.name == "NameError"
    assert box.run_code("mine", context=context).text == "1"
    if hasattr(box, "list_code_contexts"):
        assert context.id in [one.id for one in box.list_code_contexts()]
        box.restart_code_context(context)
        assert box.run_code("mine", context=context).error.name == "NameError"
        box.remove_code_context(context)
        assert context.id not in [one.id for one in box.list_code_contexts()]
    gone = e2b_code_interpreter.Context("nosuchcontext", "python", "/")
    raised(e2b.NotFoundException, lambda: box.run_code("1", context=gone))
    for wrong in ({"context_id": "default", "language": "python"}, {"context_id": 7}):
        assert envd(box, "POST", "/execute", port=49999, json={"code": "1", **wrong}).status_code == 400, wrong
    raised(e2b.SandboxException, lambda: box.run_code("1", language="cobol"), "501")
    raised(e2b.SandboxException, lambda: box.create_code_context(language="cobol"), "501")


def other_languages_keep_their_variables():
    """Each with values, output, errors by their name there, variables of an execution, and contexts of its own."""
    box = shared()
    for language, first, then, failing, name in (
        ("bash", "x=4; cd /tmp; echo oh >&2", "echo $((x * 2)) $PWD", "exit 3", "InterpreterEnded"),
        ("js", "const x = 4; console.error('oh')", "await Promise.resolve(x * 2)", "nope", "ReferenceError"),
        ("java", 'int x = 4; System.err.println("oh");', "x * 2", 'throw new IllegalStateException("no")', "IllegalSt"),
        ("r", "x <- 4; message('oh')", "x * 2", "stop('no')", "Error"),
        ("ts", "const x: number = 4; console.error('oh')", "x * 2", "nope", "ReferenceError"),
    ):
        done = box.run_code(first, language=language)
        if done.error is not None:  # The image has no such thing, and the error says what would help.
            assert language in ("js", "java", "r", "ts"), done
            assert "take an image" in done.error.value, done
            continue
        assert (done.text, "".join(done.logs.stderr)) == (None, "oh\n"), done
        done = box.run_code(then, language=language)
        assert "8" in (done.text or "".join(done.logs.stdout)), done
        done = box.run_code(failing, language=language)
        assert done.error.name.startswith(name), done
    done = box.run_code("echo $SAID $ONCE", language="bash", envs={"ONCE": "once"})
    assert done.logs.stdout == ["to all once\n"]
    assert box.run_code("echo $SAID $ONCE", language="bash").logs.stdout == ["to all\n"]
    # What is started in the background does not hold up the code after it, nor the end of the interpreter.
    before = time.monotonic()
    box.run_code("sleep 60 & exit 4", language="bash")
    assert time.monotonic() - before < 20
    if hasattr(box, "create_code_context"):
        context = box.create_code_context(language="bash", cwd="/tmp")
        assert (context.language, context.cwd) == ("bash", "/tmp")
        box.run_code("own=1", context=context)
        assert box.run_code("echo $own $PWD", context=context).logs.stdout == ["1 /tmp\n"]
        assert box.run_code("echo [$own]", language="bash").logs.stdout == ["[]\n"]
        if hasattr(box, "restart_code_context"):
            box.restart_code_context(context)
            assert box.run_code("echo [$own]", context=context).logs.stdout == ["[]\n"]


def contexts_run_at_once_and_end_alone():
    """Each is a process: they wait for each other, one that ends itself begins anew, pause and fork keep them all."""
    needs(Sandbox, "create_code_context")
    meet = "import os, time\nopen('/tmp/{0}', 'w').close()\n"
    meet += "while not os.path.exists('/tmp/{1}'): time.sleep(0.01)\n'met'"
    with Sandbox.create(timeout=300) as box:
        one, other = box.create_code_context(), box.create_code_context(cwd="/tmp")
        with concurrent.futures.ThreadPoolExecutor() as threads:
            first = threads.submit(box.run_code, meet.format(1, 2), context=one)
            second = threads.submit(box.run_code, meet.format(2, 3), context=other)
            third = threads.submit(box.run_code, meet.format(3, 1))
            ran = [one.result() for one in (first, second, third)]
        assert [one.text for one in ran] == ["met"] * 3, [(one.text, one.error, one.logs) for one in ran]
        box.run_code("kept = [1]", context=other)
        ended = box.run_code("os._exit(3)", context=one)
        assert "exit code 3" in ended.error.value, ended
        assert box.run_code("'os' in globals()", context=one).text == "False"
        assert box.run_code("1 / 0", context=one).error.name == "ZeroDivisionError"
        raised(e2b.TimeoutException, lambda: box.run_code("import time; time.sleep(600)", context=one, timeout=1))
        assert box.run_code("time.__name__", context=one, timeout=60).text == "time"
        raised(e2b.SandboxException, lambda: box.create_code_context(cwd="/no/such"), "400")
        box.pause()
        box = Sandbox.connect(box.sandbox_id)
        if hasattr(box, "fork"):
            clone = box.fork()[0]
            assert clone.run_code("kept.append(2); kept, os.getcwd()", context=other).text == "([1, 2], '/tmp')"
            clone.kill()
        assert box.run_code("kept", context=other).text == "[1]"


def variables_of_one_execution_are_gone_after_it():
    """In the default context and in others, in Python and in bash; the sandbox's own are as they were."""
    box = shared()
    places = [{}, {"context": box.create_code_context()}] if hasattr(box, "create_code_context") else [{}]
    for where in (*places, {"language": "bash"}):
        ask = (
            "echo $SAID$GIVEN"
            if "language" in where
            else "import os; print(os.environ['SAID'] + os.getenv('GIVEN', ''))"
        )
        for envs, told in (({"SAID": "once ", "GIVEN": "more"}, "once more"), ({}, "to all")):
            done = box.run_code(ask, envs=envs, **where)
            assert done.logs.stdout == [told + "\n"], (where, done)
    failed = box.run_code("1 / 0", envs={"GIVEN": "more"})
    assert failed.error.name == "ZeroDivisionError"
    assert box.run_code("os.getenv('GIVEN')").text is None


def a_sandbox_that_ends_breaks_off_what_it_runs():
    """Its client is not told that the code has ended."""
    box = Sandbox.create(timeout=100)
    box.run_code("1")
    killer = threading.Timer(1, box.kill)
    killer.start()
    said = "sandbox was killed while the request was in progress"
    raised(e2b.TimeoutException, lambda: box.run_code("import time; time.sleep(300)", timeout=200), said)
    killer.join()
    box = Sandbox.create(timeout=100)
    running = box.commands.run("sleep 300", background=True)
    box.kill()
    raised(e2b.TimeoutException, running.wait, "sandbox was killed or reached its end of life")


def a_client_that_goes_away_interrupts():
    """So that the next code does not wait for it."""
    box = shared()
    code = (
        "import time\nstate = 'began'\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    state = 'interrupted'"
    )
    raised(e2b.TimeoutException, lambda: box.run_code(code, timeout=1))
    assert box.run_code("state", timeout=60).text == "interrupted"


def the_async_client_works_the_same():
    """Create, code, commands, files, list and kill, at once."""

    async def all_of_it():
        box = await AsyncSandbox.create(timeout=100)
        code, command, _ = await asyncio.gather(
            box.run_code("6 * 7"), box.commands.run("echo hi"), box.files.write("a", "b")
        )
        assert (code.text, command.stdout, await box.files.read("a")) == ("42", "hi\n", "b")
        assert box.sandbox_id in [info.sandbox_id for info in await AsyncSandbox.list().next_items()]
        assert await box.kill()

    asyncio.run(all_of_it())


# --- the wire itself -------------------------------------------------------------------------------------------------


def health_environment_and_metrics_of_envd():
    """Over plain HTTP; nothing without the sandbox's token."""
    box = shared()
    assert envd(box, "GET", "/health").status_code == 204
    assert envd(box, "GET", "/health", port=49999).status_code == 204
    assert envd(box, "GET", "/envs").json()["SAID"] == "to all"
    assert envd(box, "GET", "/metrics").json()["mem_used"] > 0
    for token in ("", "wcs_.0", shared().traffic_access_token):
        assert envd(box, "GET", "/envs", headers={"X-Access-Token": token}).status_code == 401
    bare = {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "49999"}
    assert httpx.get(API + "/contexts", headers=bare).status_code == 401


def other_sandboxes_and_ports_are_not_there():
    """502 with the words by which clients know why."""
    box = shared()
    gone = envd(box, "GET", "/envs", headers={"E2b-Sandbox-Id": "a" * 12})
    assert (gone.status_code, box.sandbox_id in gone.text) == (401, False)
    closed = envd(box, "GET", "/", port=3000)
    assert closed.status_code == 502
    assert "port is not open" in closed.json()["message"]
    ended = Sandbox.create(timeout=100)
    assert ended.kill()
    kind = getattr(e2b, "SandboxNotRunningException", e2b.TimeoutException)
    raised(kind, lambda: ended.commands.run("true"))
    raised(kind, lambda: ended.files.read("x"))
    raised(e2b.TimeoutException, lambda: ended.run_code("1"))


def what_listens_on_another_port_answers():
    """By headers and by host, for who has a token of the sandbox; it does not see that token."""
    box = shared()
    box.run_code(
        "import http.server, threading\n"
        "class Page(http.server.BaseHTTPRequestHandler):\n"
        "    def do_POST(self):\n"
        "        said = self.rfile.read(int(self.headers['Content-Length']))\n"
        "        self.send_response(201)\n"
        "        self.end_headers()\n"
        "        self.wfile.write(said + f'|{self.path}|{self.headers}'.encode())\n"
        "web = http.server.HTTPServer(('127.0.0.1', 3001), Page)\n"
        "threading.Thread(target=web.serve_forever, daemon=True).start()"
    )
    answer = envd(box, "POST", "/a?b=c", port=3001, content=b"said")
    assert answer.status_code == 201, answer.text
    assert answer.text.startswith("said|/a?b=c|Host: localhost:3001")
    assert box._envd_access_token not in answer.text
    root = urllib.parse.urlsplit(API)
    headers = {"Host": f"3001-{box.sandbox_id}.sandboxes.example"}
    at = f"{root.scheme}://{root.netloc}/a"
    assert httpx.post(at, headers=headers, content=b"x").status_code == 401
    headers["E2b-Traffic-Access-Token"] = box.traffic_access_token
    assert httpx.post(at, headers=headers, content=b"x").status_code == 201
    box.run_code("web.shutdown(); web.server_close()")
    assert envd(box, "POST", "/", port=3001, content=b"").status_code == 502


def sandboxes_are_found_by_host_name():
    """With a wildcard domain there are no headers: port and id are in the host, on the server's root."""
    box = shared()
    root = urllib.parse.urlsplit(API)
    headers = {"Host": f"49983-{box.sandbox_id}.sandboxes.example", "X-Access-Token": box._envd_access_token}
    box.files.write("by-host", "found")
    answer = httpx.get(f"{root.scheme}://{root.netloc}/files?path=by-host", headers=headers)
    assert (answer.status_code, answer.text) == (200, "found")
    listed = httpx.get(f"{root.scheme}://{root.netloc}/v2/sandboxes", headers={"X-API-KEY": KEY})
    assert box.sandbox_id in [one["sandboxID"] for one in listed.json()]


def calls_that_are_none_get_typed_errors():
    """Wrong types, wrong framing, wrong fields: by code, and the connection goes on."""
    box = shared()
    start = "/process.Process/Start"
    stream = {"Content-Type": "application/connect+json"}
    assert envd(box, "POST", start, content=b"{}", headers={"Content-Type": "application/proto"}).status_code == 501
    for content in (b"", b"junk", b"\0\0\0\0\2[]", b"\1\0\0\0\2{}", b"\0\xff\xff\xff\xff", b"\0\0\0\0\2{}"):
        answer = envd(box, "POST", start, content=content, headers=stream)
        assert answer.status_code == 200, content
        assert answer.content[0] == 2
        assert json.loads(answer.content[5:])["error"]["code"] in (
            "invalid_argument",
            "unimplemented",
            "resource_exhausted",
        ), content
    answer = envd(box, "POST", "/filesystem.Filesystem/Stat", json={"path": 7})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")
    answer = envd(
        box, "POST", "/process.Process/SendSignal", json={"process": {"pid": 1, "tag": "x"}, "signal": "SIGNAL_SIGKILL"}
    )
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")


def errors_of_calls_are_the_packages_own():
    """Connect's codes, as the exceptions and answers that clients make of them."""
    box = shared()
    for path, message, status, code in (
        ("Stat", {"path": "nowhere"}, 404, "not_found"),
        ("MakeDir", {"path": "/tmp"}, 409, "already_exists"),
        ("ListDir", {"path": ""}, 400, "invalid_argument"),
        ("Nothing", {}, 404, "not_found"),
    ):
        answer = envd(box, "POST", f"/filesystem.Filesystem/{path}", json=message)
        assert (answer.status_code, answer.json()["code"]) == (status, code), (path, answer.text)
    late = {"Content-Type": "application/connect+json", "connect-timeout-ms": "300", "connect-protocol-version": "1"}
    message = json.dumps({"process": {"cmd": "sleep", "args": ["60"]}}).encode()
    content = b"\0" + len(message).to_bytes(4, "big") + message
    told = envd(box, "POST", "/process.Process/Start", headers=late, content=content).content
    assert b'"start":{"pid":' in told
    assert told.index(b'"start"') < told.index(b'"deadline_exceeded"')
    raised(e2b.NotFoundException, lambda: box.files.get_info("nowhere"))


def shown_is_ended():
    """The last one: the shared sandbox ends."""
    assert shared().kill() is True
    raised(e2b.SandboxException, lambda: shared().commands.run("true"))


def _resolve_domain():
    """What a wildcard record of the domain's name server does: all its names are this machine."""
    name = DOMAIN.partition(":")[0]
    resolve = socket.getaddrinfo

    def local(host, *arguments, **more):
        text = host.decode() if isinstance(host, bytes) else host
        return resolve("127.0.0.1" if text and text.endswith(name) else host, *arguments, **more)

    socket.getaddrinfo = local


def main():
    """Until standard input ends."""
    if DOMAIN:
        _resolve_domain()
    for line in sys.stdin:
        began = time.monotonic()
        try:
            globals()[line.strip()]()
            said = {"status": "passed"}
        except AbsentError as error:
            said = {"status": "absent", "why": f"e2b {'.'.join(map(str, VERSION))} has no {error}"}
        except BaseException:
            said = {"status": "failed", "why": traceback.format_exc()}
        sys.stdout.write(json.dumps({**said, "seconds": time.monotonic() - began}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
