"""Variables as they travel: out-of-band buffers, sharing, sizes, and what is refused by name."""

import errno
import functools
import io
import json
import math
import socket
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from warmcell.sandbox.guest import modules, values
from warmcell.sandbox.guest.values import CannotTravelError, NoRoomError, TooLargeError, dumps, loads, pack


def there_and_back(**given: Any) -> dict[str, Any]:
    return loads(bytearray(dumps(given)))


def test_arrays_stay_out_of_the_pickle_and_can_be_written_to() -> None:
    """A large array is a buffer of its own, aligned, and on the other side an ordinary array."""
    array = np.arange(100_000.0)
    packed = pack({"a": array, "small": np.arange(3)})
    assert [view.nbytes for view in packed.buffers] == [array.nbytes]
    assert len(packed.stream) < 2000
    found = there_and_back(a=array, small=np.arange(3))
    assert (found["a"] == array).all()
    found["a"][0] = 7
    assert array[0] == 0
    assert loads(dumps({"a": array}))["a"].flags.writeable


def test_what_is_shared_is_shared_on_the_other_side() -> None:
    """Two names of one object, and two parameters of one tensor, stay one."""
    weight = torch.nn.Parameter(torch.ones(200, 200))
    found = there_and_back(a=[weight], b={"w": weight})
    assert found["a"][0] is found["b"]["w"]
    assert isinstance(found["a"][0], torch.nn.Parameter)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(100_000),
        torch.ones(300, 300, dtype=torch.bfloat16),
        torch.tensor(2.5),
        torch.empty(0, 3),
        torch.ones(400, 400).t()[::2],
        torch.ones(5, requires_grad=True),
        torch.ones(3).to_sparse(),
        torch.tensor([1 + 2j]),
        torch.tensor([True, False]),
    ],
    ids=str,
)  # fmt: skip
def test_tensors_of_every_kind_travel(tensor: torch.Tensor) -> None:
    """With type, shape and gradient flag; sparse and empty ones too."""
    found = there_and_back(t=tensor)["t"]
    assert (found.dtype, found.shape, found.requires_grad) == (tensor.dtype, tensor.shape, tensor.requires_grad)
    assert torch.equal(found.to_dense(), tensor.to_dense())


def test_a_model_and_its_optimizer_stay_together() -> None:
    """The optimizer steps the parameters of the model that it came with."""
    model = torch.nn.Linear(200, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = there_and_back(model=model, optimizer=optimizer)
    assert found["optimizer"].param_groups[0]["params"][0] is next(found["model"].parameters())


def test_functions_go_by_value_with_what_they_use() -> None:
    """Closures, recursion, and the globals that they name."""
    scope: dict[str, Any] = {"math": math, "factor": 3, "__name__": "__main__"}
    exec("def f(n):\n    return factor * math.floor(n) + (f(n - 1) if n > 1 else 0)", scope)
    assert there_and_back(f=scope["f"])["f"](2.5) == 3 * 2 + 3 * 1


class Proxy:
    """It has whatever it is asked for, or an error of its own, as proxies outside of their context."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(f"{name}: no context")

    def __reduce__(self) -> tuple[object, ...]:
        return int, ("3",)


def test_an_object_is_asked_for_no_more_than_pickle_asks() -> None:
    """Whatever its attributes do when others look at them."""
    assert there_and_back(one=Proxy())["one"] == 3


def test_a_cache_of_what_has_no_name_goes_along() -> None:
    """As of `functools.partial`."""
    cached = functools.lru_cache(maxsize=3)(functools.partial(int, base=2))
    found = there_and_back(cached=cached)["cached"]
    assert (found("101"), found("101"), found.cache_info()[:3]) == (5, 5, (1, 1, 3))


def test_classes_are_named_whatever_their_metaclasses_compare() -> None:
    """A library may have such that have no hash; those of the notebook are named all the same."""

    class Compares(type):
        def __eq__(cls, other: object) -> Any:
            return "an expression"

    odd = Compares("Odd", (), {"__module__": "a_library"})
    own_odd = Compares("OwnOdd", (), {"__module__": "__main__"})
    own = type("Own", (), {"__module__": "__main__"})
    values.name_classes()
    assert own in values.cloudpickle().cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS
    assert odd.__name__ != own_odd.__name__


class Holder:
    """Something with a part."""

    def __init__(self, part: object) -> None:
        self.part = part


@pytest.mark.parametrize(
    ("make", "said", "cure"),
    [
        (lambda: threading.Lock(), "thing cannot be sent: it is a lock", "Make one in the remote cell"),
        (lambda: (n for n in "ab"), "thing cannot be sent: it is a generator", "as in list(…)"),
        (lambda: {"a": [threading.RLock()]}, "thing['a'][0] cannot be sent: it is a lock", "Make one"),
        (lambda: Holder(threading.Lock()), "thing.part cannot be sent: it is a lock", "Make one"),
        (lambda: sqlite3.connect(":memory:"), "it is a connection to a database", "Connect in the remote cell"),
        (lambda: threading.Event(), "thing cannot be sent: it is a lock", "Make one"),
        (lambda: sys._getframe(), "thing cannot be sent: it is a part of a running program", "what you need"),
    ],
)
def test_what_cannot_travel_is_named_with_the_cure(make: Callable[[], object], said: str, cure: str) -> None:
    """By the variable, the way to the part of it, what that is, and what to do."""
    with pytest.raises(CannotTravelError) as caught:
        pack({"fine": 1, "thing": make()})
    assert said in str(caught.value)
    assert cure in str(caught.value)


def test_files_and_sockets_are_refused(tmp_path: Path) -> None:
    """An open file, in whatever mode, and a socket; a StringIO is a value like any other."""
    (tmp_path / "f").write_text("x")
    with (tmp_path / "f").open() as file, pytest.raises(CannotTravelError, match=r"it is an open file.*Send its path"):
        pack({"log": file})
    with socket.socket() as one, pytest.raises(CannotTravelError, match="it is a socket"):
        pack({"s": one})
    assert there_and_back(s=io.StringIO("text"))["s"].getvalue() == "text"


def test_a_limit_holds_before_anything_is_copied() -> None:
    """Buffers count before they are read, and a pickle ends where it becomes too long."""
    huge = np.zeros(2**31, dtype="u1")  # Of which no page is there yet.
    with pytest.raises(TooLargeError):
        pack({"huge": huge}, limit=2**30)
    with pytest.raises(TooLargeError):
        pack({"many": [b"x" * 100] * 10 + [bytes(1000)]}, limit=500)
    assert pack({"few": [1, 2]}, limit=500).size < 500


def test_what_is_missing_on_the_other_side_is_said() -> None:
    """A module that is not there is named, with how to have it."""
    stream = b"\x80\x05}\x94\x8c\x01x\x94\x8c\x0enot_there.part\x94\x8c\x01y\x94\x93\x94s."
    with pytest.raises(CannotTravelError, match=r"need not_there, which is missing here.*pip install not_there"):
        values.unpack(stream, ())


def test_modules_of_the_folder_are_loaded_again_where_they_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are given with their source; a rank that has an older one has the newer one after that."""
    monkeypatch.setattr(modules, "_folders", lambda folder: (folder,))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wc_helpers.py").write_text("def answer():\n    return 41\n")
    import wc_helpers  # type: ignore[import-not-found]

    try:
        given = modules.give(str(tmp_path))
        assert list(given) == ["wc_helpers"]
        modules.take(json.loads(json.dumps(given)))
        assert wc_helpers.answer() == 41
        (tmp_path / "wc_helpers.py").write_text("def answer():\n    return 42  # longer\n")
        modules.take(json.loads(json.dumps(modules.give(str(tmp_path)))))
        assert wc_helpers.answer() == 42
        del sys.modules["wc_helpers"]
        (tmp_path / "wc_helpers.py").unlink()
        import wc_helpers as found

        assert found.answer() == 42
    finally:
        sys.modules.pop("wc_helpers", None)
        sys.meta_path[:] = [one for one in sys.meta_path if type(one).__module__ != modules.__name__]


class Copied(Exception):
    """Raised by what must not be copied."""


def test_nothing_that_is_too_large_is_copied_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a tensor to make it contiguous, nor an array whose parts lie apart."""

    def copied(*_: object) -> None:
        raise Copied

    monkeypatch.setattr(values.tensors, "reduce", copied)
    every_other = np.lib.stride_tricks.as_strided(np.zeros(1), (2**31,), (0,))
    for value in (torch.zeros(1).expand(2**31), every_other, {"deep": [every_other]}):
        with pytest.raises(TooLargeError):
            pack({"value": value}, limit=2**30)
    with pytest.raises(CannotTravelError, match="Copied"):
        pack({"value": torch.zeros(5)}, limit=2**30)


def test_what_comes_back_has_a_limit_and_leaves_nothing_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too much is named with its sizes; no room is an error of its own; no part of a file stays."""
    names = {"huge": np.zeros(2**20), "few": [1], "lock": threading.Lock()}
    monkeypatch.setattr(values, "namespace", lambda: names)
    out = tmp_path / "get.pkl"
    with pytest.raises(TooLargeError, match=r"more than the 4\.0 MiB that may: huge 8\.0 MiB, few"):
        values.dump(["huge", "few"], str(out), limit=4 * 2**20)
    with pytest.raises(CannotTravelError, match="lock"):
        values.dump(["lock"], str(out), limit=4 * 2**20)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(values.os, "posix_fallocate", full)
        with pytest.raises(NoRoomError, match=r"no room in the sandbox for the 8\.0 MiB"):
            values.dump(["huge"], str(out))
    assert list(tmp_path.iterdir()) == []
    values.dump(["huge", "few"], str(out), limit=16 * 2**20)
    assert [path.name for path in tmp_path.iterdir()] == ["get.pkl"]
    assert loads(out.read_bytes())["few"] == [1]
