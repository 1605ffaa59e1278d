"""Variables on their way between kernels."""

import threading
from pathlib import Path

import pytest

from warmcell.sandbox.guest.values import CannotTravelError, dump, dumps, load, loads


class Shell:
    """What stands for the running shell here: only its namespace is used."""

    def __init__(self) -> None:
        self.user_ns: dict[str, object] = {}


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    found = Shell()
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: found)
    return found


def test_shared_objects_stay_shared() -> None:
    """Two variables that hold the same list hold the same list on the other side."""
    inner = [1]
    back = loads(dumps({"a": inner, "b": {"inner": inner}}))
    assert back["a"] is back["b"]["inner"]


def test_functions_of_the_notebook_travel_by_value() -> None:
    """A function that no module has is sent with its code and what it closes over."""
    namespace: dict[str, object] = {"__name__": "__main__", "factor": 3}
    exec("def scale(x): return x * factor", namespace)
    scale = loads(dumps({"scale": namespace["scale"]}))["scale"]
    assert scale(4) == 12


def test_what_cannot_be_sent_is_named() -> None:
    """The error says which of the variables it is, and why."""
    with pytest.raises(CannotTravelError, match=r"^lock cannot be sent: TypeError: .*lock"):
        dumps({"fine": 1, "lock": threading.Lock()})


def test_what_cannot_be_unpacked_is_said() -> None:
    """A module that is missing here is in the message."""
    with pytest.raises(CannotTravelError, match="no_such_module"):
        loads(b"cno_such_module\nthing\n.")


def test_values_go_through_files(shell: Shell, tmp_path: Path) -> None:
    """`dump` writes variables of the namespace, `load` puts them into one."""
    path = tmp_path / "v.pkl"
    shell.user_ns.update(x=1, y=[2])
    dump(["x", "y"], str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["v.pkl"]
    shell.user_ns.clear()
    load(str(path))
    assert shell.user_ns == {"x": 1, "y": [2]}


def test_a_missing_variable_writes_nothing(shell: Shell, tmp_path: Path) -> None:
    """The error names it, and there is no file, whole or in part."""
    shell.user_ns["x"] = 1
    with pytest.raises(NameError, match="'missing'"):
        dump(["x", "missing"], str(tmp_path / "v.pkl"))
    assert list(tmp_path.iterdir()) == []
