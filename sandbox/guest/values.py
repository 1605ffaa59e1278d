"""Variables on their way between kernels: pickled and unpickled in sandboxes only.

The keeper has a remote kernel run `load` before a cell and `dump` after it; the files lie in the sandbox's run
directory. In a kernel this module is `warmcell_guest.values`.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterable, Mapping
from typing import Any


class CannotTravelError(TypeError):
    """A variable that cannot be pickled, or not be unpickled on the other side."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def dumps(values: Mapping[str, Any]) -> bytes:
    """`values` as bytes. Objects that they share are shared on the other side too.

    Functions and classes of the notebook go by value, others by the name of their module.

    Raises:
        CannotTravelError: One cannot be pickled; the message names it.
    """
    cloudpickle = _cloudpickle()
    try:
        return bytes(cloudpickle.dumps(dict(values), protocol=5))
    except Exception as error:
        culprit = next((name for name, value in values.items() if not _travels(cloudpickle, value)), "")
        raise CannotTravelError(f"{culprit or 'A variable'} cannot be sent: {_words(error)}") from error


def loads(data: bytes) -> dict[str, Any]:
    """The values in `data`.

    Raises:
        CannotTravelError: Something that they need is not here.
    """
    _cloudpickle()
    try:
        values = pickle.loads(data)  # noqa: S301 - by design: code and data of the same notebook.
    except Exception as error:
        raise CannotTravelError(f"The values cannot be unpacked here: {_words(error)}") from error
    return dict(values)


def load(path: str) -> None:
    """Put the values in the file `path` into this kernel's namespace."""
    with open(path, "rb") as file:
        _namespace().update(loads(file.read()))


def dump(names: Iterable[str], path: str) -> None:
    """Write the variables `names` of this kernel to the file `path`.

    Raises:
        NameError: There is no such variable.
        CannotTravelError: One of them cannot be pickled.
    """
    namespace = _namespace()
    for name in names:
        if name not in namespace:
            raise NameError(f"name {name!r} is not defined in the remote cell")
    data = dumps({name: namespace[name] for name in names})
    with open(f"{path}.part", "xb") as file:
        file.write(data)
    os.rename(f"{path}.part", path)


def _namespace() -> dict[str, Any]:
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    assert shell is not None
    namespace: dict[str, Any] = shell.user_ns
    return namespace


def _travels(cloudpickle: Any, value: Any) -> bool:
    try:
        cloudpickle.dumps(value, protocol=5)
    except Exception:
        return False
    return True


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _cloudpickle() -> Any:
    """The environment's cloudpickle, else the carried one.

    It must be importable by its own name here, since that is how pickles refer to it.
    """
    try:
        import cloudpickle
    except ImportError:
        carried = os.path.join(os.path.dirname(os.path.abspath(__file__)), "carried")
        sys.path.append(carried)
        try:
            import cloudpickle
        except ImportError:
            raise CannotTravelError(
                "Variables can be sent only with cloudpickle, which is missing here: run `%pip install cloudpickle`"
            ) from None
        finally:
            sys.path.remove(carried)
    return cloudpickle
