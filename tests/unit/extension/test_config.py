"""The operator's configuration: what is wrong in it is one error, never a bound that is silently not there."""

import logging

import pytest
from traitlets.config import Config

from tests.leaks import Places
from warmcell.extension import config
from warmcell.extension.keeper.logs import KeeperLog
from warmcell.sandbox.errors import InvalidRequestError


def write(places: Places, text: str) -> None:
    directory = places.root / "jupyter" / "config"
    directory.mkdir(parents=True)
    (directory / "jupyter_warmcell_config.py").write_text(text)


@pytest.mark.parametrize(
    ("text", "says", "cure"),
    [
        ("c.Warmcell.prepared = = 1", "SyntaxError", "Mend it"),
        ("import no_such_module", "no_such_module", "Mend it"),
        ("c.Warmcell.netwroks = ['none']", "c.Warmcell.netwroks is no setting", "Did you mean c.Warmcell.networks?"),
        ("c.WarmCell.networks = ['none']", "c.WarmCell is nobody's", "Did you mean c.Warmcell?"),
        ("c.Warmcel.max_memory = 8", "c.Warmcel is nobody's", "Did you mean c.Warmcell?"),
        ("c.Warmcell.max_memory = 'lots'", "max_memory", "Mend"),
        ("c.Warmcell.prepared = -1", "prepared", "Mend"),
    ],
)
def test_what_cannot_be_read_is_said_with_the_cure(places: Places, text: str, says: str, cure: str) -> None:
    """The error names the place and what to do."""
    write(places, text)
    with pytest.raises(InvalidRequestError) as raised:
        config.settings()
    assert says in raised.value.message
    assert cure in raised.value.hint


def test_what_is_for_others_is_left_to_them(places: Places) -> None:
    """Jupyter's own classes may be configured beside ours, also those whose names begin like it."""
    write(places, "c.ServerApp.port = 8000\nc.WarmcellApp.open_browser = False\nc.Warmcell.prepared = 2")
    assert config.settings().prepared == 2


def test_what_a_server_alone_was_told_is_known_to_be_unseen(places: Places) -> None:
    """Settings of one server do not reach the keeper; those that only servers read are not among them."""
    write(places, "c.Warmcell.prepared = 2")
    told = Config({"Warmcell": {"prepared": 2, "simulated_gpus": [{"name": "A100"}], "sandboxed_only": True}})
    assert config.unseen(config.Warmcell(config=told)) == ["simulated_gpus"]


def test_the_log_does_not_grow_without_bound(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files at most, each of a bounded size, and the latest line is in the current one."""
    monkeypatch.setattr("os.dup2", lambda source, target: target)
    path = places.root / "keeper.log"
    handler = KeeperLog(path, max_bytes=1000)
    for n in range(500):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "line %d", (n,), None))
    handler.close()
    files = sorted(places.root.glob("keeper.log*"))
    assert [file.name for file in files] == ["keeper.log", "keeper.log.1"]
    assert all(file.stat().st_size <= 1000 for file in files)
    assert "line 499" in path.read_text()


def test_who_may_not_have_the_machines_network_may_ask_for_no_host_unless_the_operator_says_so(places: Places) -> None:
    """An operator who has closed the network need not know of a second way out."""
    assert config.Warmcell().egress_bounds == ("*",)
    assert config.Warmcell(config=Config({"Warmcell": {"networks": ["none"]}})).egress_bounds == ()
    told = Config({"Warmcell": {"networks": ["none"], "egress_allowed": ["pypi.org"]}})
    assert config.Warmcell(config=told).egress_bounds == ("pypi.org",)
