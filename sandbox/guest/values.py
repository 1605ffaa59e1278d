"""Variables on their way between kernels: pickled and unpickled in sandboxes only.

A remote kernel does `load` before a cell and `dump` after it; the files lie in the sandbox's run
directory. In a kernel this module is `warmcell_guest.values`. Large buffers (arrays, tensors) stay out of the pickle:
they are mapped from a file, each rank's changes being its own.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import importlib
import importlib.util
import json
import mmap
import os
import pickle
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from . import functions, modules, tensors
from .refusals import REFUSED_FILES, CannotTravelError, NoRoomError, TooLargeError, blame, words
from .weights import in_words, own_bytes, size_of, weights

__all__ = ["CannotTravelError", "NoRoomError", "Packed", "TooLargeError", "dump", "dumps", "load", "loads", "pack"]

ALIGN_BYTES = 64
"""Where buffers begin in a file: what vector instructions ask for."""

OUT_OF_BAND_BYTES = 64 * 1024
"""Smaller buffers go inside the pickle."""

LOST = "not here any more: "
"""How the error begins that names what a kernel was believed to have."""

RESULT = "_warmcell_result"
"""The variable with what a function has returned that was called on a rank."""

INHERITED = "_warmcell_items"
"""The variable with the items of a cell whose ranks are clones."""

_held: dict[str, str] = {}
"""What was sent to this kernel last, by name: the sender's tag of it."""


class Packed(NamedTuple):
    """Pickled values: the pickle, and the buffers that it refers to in order."""

    stream: bytes
    buffers: Sequence[memoryview]

    @property
    def size(self) -> int:
        """All bytes of it."""
        return len(self.stream) + sum(view.nbytes for view in self.buffers)


def pack(
    values: Mapping[str, Any],
    *,
    limit: int | None = None,
    there: bool = False,
    back: Mapping[str, str] | None = None,
) -> Packed:
    """Pickle `values` together: objects that they share are shared on the other side too.

    Functions and classes of the notebook go by value, others by the name of their module.

    Args:
        values: By name.
        limit: Most bytes that may come of it.
        there: Functions of this notebook use the other notebook's variables there, and bring those that they need.
        back: They go back to whoever has sent the cell; how errors call some of them.

    Raises:
        TooLargeError: They come to more than `limit`.
        CannotTravelError: One cannot be pickled; the message names it, and what to do.
    """
    try:
        return _pack(dict(values), limit, there=there)
    except TooLargeError:
        raise
    except Exception as error:
        raise blame(values, error, lambda value: _travels(value, there=there), back=back) from error


def dumps(values: Mapping[str, Any]) -> bytes:
    """`values` as bytes for `loads`; raises as `pack`."""
    return b"".join(framed(pack(values)))


def framed(packed: Packed) -> Iterable[bytes | memoryview]:
    """The pieces of a file that `loads` reads: a line that tells the sizes, the pickle, then each buffer."""
    sizes = [len(packed.stream), *(view.nbytes for view in packed.buffers)]
    head = json.dumps(sizes).encode()
    at = len(head) + 1
    head += b" " * (-at % ALIGN_BYTES) + b"\n"
    yield head
    at = len(head)
    for piece in (memoryview(packed.stream), *packed.buffers):
        yield bytes(-at % ALIGN_BYTES)
        at += -at % ALIGN_BYTES
        yield piece
        at += piece.nbytes


def loads(data: bytes | bytearray | memoryview) -> dict[str, Any]:
    """The values in `data`, whose buffers they keep using where these can be written to.

    Raises:
        CannotTravelError: Something that they need is not here.
    """
    view = memoryview(data)
    if view.readonly:
        view = memoryview(bytearray(view))
    at = bytes(view[:65536]).find(b"\n") + 1
    pieces = []
    for size in json.loads(bytes(view[:at])):
        at += -at % ALIGN_BYTES
        pieces.append(view[at : at + size])
        at += size
    return unpack(pieces[0], pieces[1:])


def unpack(stream: bytes | memoryview, buffers: Iterable[memoryview]) -> dict[str, Any]:
    """The values of a pickle and its buffers; raises as `loads`."""
    import io

    cloudpickle()
    try:
        values = _Unpickler(io.BytesIO(stream), buffers=buffers).load()
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        raise CannotTravelError(
            f"The values need {missing or 'a module'}, which is missing here ({error})",
            f"Run `%pip install {missing}` in a %%remote cell, or choose an image that has it." if missing else "",
        ) from error
    except CannotTravelError:
        raise
    except Exception as error:
        raise CannotTravelError(f"The values cannot be unpacked here: {words(error)}") from error
    return dict(values)


def load(said: Mapping[str, Any]) -> None:
    """Put values into this kernel's namespace.

    Args:
        said: `directory`, `stream` and `buffers`: where the pickle and its buffers are, as [file, start, bytes];
            `inline`: a small pickle itself, in base64; `tags`: what the sender calls them; `held`: what it believes to
            be here already, with an empty tag where the kernel has made it itself; `modules`: of its folder;
            `folder`: where the sender is now, if that is new; `item`: the number of the one, of those that this kernel
            has inherited, which the cell is for.

    Raises:
        LookupError: Something of `held` is not here any more; nothing was loaded.
        CannotTravelError: Something that they need is not here.
    """
    names = namespace()
    lost = [name for name, tag in said["held"].items() if not _is_here(name, tag, names)]
    if lost:
        raise LookupError(f"{LOST}{', '.join(lost)}")
    with contextlib.suppress(OSError):  # Elsewhere than in the folder that both see.
        os.chdir(said.get("folder") or ".")
    modules.take(said["modules"])
    maps: dict[str, memoryview] = {}
    buffers = [_mapped(maps, said["directory"], *place) for place in said["buffers"]]
    if said.get("inline"):
        names.update(unpack(base64.b64decode(said["inline"]), buffers))
    elif said["stream"]:
        names.update(unpack(_mapped(maps, said["directory"], *said["stream"]), buffers))
    if "item" in said:
        names.update(item=names[INHERITED][said["item"]], index=said["item"])
    _held.update(said["tags"])
    _show_figures()


def _show_figures() -> None:
    """Have figures that came here be pictures, as they are for whoever makes one: that comes with the first pyplot."""
    inline = "matplotlib_inline.backend_inline"
    if (
        "matplotlib.figure" in sys.modules
        and inline not in sys.modules
        and "inline" in os.environ.get("MPLBACKEND", "")
    ):
        with contextlib.suppress(Exception):  # Then they are text.
            importlib.import_module(inline)


def lost_of(told: str) -> list[str]:
    """The names in the text of `load`'s LookupError."""
    return told[len(LOST) :].split(", ") if told.startswith(LOST) else []


def _is_here(name: str, tag: str, names: Mapping[str, Any]) -> bool:
    """Whether this kernel has what is called that; modules, which are none of its variables, have no name."""
    return (not tag or _held.get(name) == tag) and (not name or name in names)


def dump(names: Iterable[str], path: str, last: str = "", *, limit: int | None = None) -> None:
    """Write the variables `names` of this kernel, and the value of its last cell as `last`, to the file `path`.

    Args:
        names: Variables.
        path: Of a file that is not there yet; nothing of it is there if this fails.
        last: What that value is called; empty: it is not wanted.
        limit: Most bytes that may come of it.

    Raises:
        NameError: There is no such variable.
        TooLargeError: They come to more than `limit`.
        NoRoomError: They do not fit into the run directory now.
        CannotTravelError: One of them cannot be pickled.
    """
    found = namespace()
    for name in names:
        if name not in found:
            raise _not_there(name)
    values = {name: found[name] for name in names}
    if last:
        from IPython.core.getipython import get_ipython

        values[last] = getattr(getattr(get_ipython(), "last_execution_result", None), "result", None)
    try:
        packed = pack(values, limit=limit, back={RESULT: "What the function returns", last: "The last line's value"})
    except TooLargeError:
        said = in_words(
            weights({("its last line" if name == last else name): one for name, one in values.items()}, limit)
        )
        raise TooLargeError(
            f"What is to come back is more than the {size_of(limit or 0)} that may: {said}",
            "Bring back less, write it to a file in the folder that both see, or raise c.Warmcell.remote_values.",
        ) from None
    try:
        _write(f"{path}.part", list(framed(packed)))
        os.rename(f"{path}.part", path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise NoRoomError(
            f"There is no room in the sandbox for the {size_of(packed.size)} that are to come back",
            "Bring back less, or write it to a file in the folder that both see.",
        ) from None


def _not_there(name: str) -> NameError:
    """The error for a variable that is asked for; that we have looked for it is of no interest."""
    error = NameError(f"name {name!r} is not defined in the remote cell")
    error._render_traceback_ = lambda: [f"NameError: {error}"]  # type: ignore[attr-defined]
    return error


def _write(path: str, pieces: Sequence[bytes | memoryview]) -> None:
    """A new file, whose room is taken before anything is copied; none if that fails."""
    with open(path, "xb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, sum(memoryview(piece).nbytes for piece in pieces))
            for piece in pieces:
                file.write(piece)
        except BaseException:
            os.unlink(path)
            raise


def namespace() -> dict[str, Any]:
    """The variables of this kernel's notebook, or of a program that is none."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    names: dict[str, Any] = vars(sys.modules["__main__"]) if shell is None else shell.user_ns
    return names


def cloudpickle() -> Any:
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
                "Variables can be sent only with cloudpickle, which is missing here", "Run `%pip install cloudpickle`."
            ) from None
        finally:
            sys.path.remove(carried)
    return cloudpickle


def name_classes() -> None:
    """Have this notebook's classes be known in clones that are made now, so that what comes back is of the same ones.

    Else each clone gives them a name of its own when it pickles them, and a class of that name would be made here.
    """
    name = cloudpickle().cloudpickle._get_or_create_tracker_id
    found: dict[int, type] = {}  # By identity: metaclasses may compare otherwise, and then have no hash.
    queue: list[type] = [object]
    while queue:
        below: list[type] = type.__subclasses__(queue.pop())
        new = {id(kind): kind for kind in below if id(kind) not in found}
        found.update(new)
        queue += new.values()
    for kind in found.values():
        if kind.__module__ == "__main__":
            with contextlib.suppress(TypeError):  # One without a hash goes by value each time.
                name(kind)


def _asks_for_shell() -> Any:
    from IPython.core.getipython import get_ipython

    return get_ipython


def code(bytecode: bytes, version: str, make: Any, arguments: Sequence[Any]) -> types.CodeType:
    """What a function runs. Another version of Python would read its bytecode as something else, and crash.

    Raises:
        CannotTravelError: It is of such a version.
    """
    if bytecode != importlib.util.MAGIC_NUMBER:
        raise CannotTravelError(
            f"Functions and classes that were made in Python {version} cannot run in Python {_python()}",
            "Choose an image with the same Python, define them in the cell that needs them, or put them into a module "
            "beside the notebook.",
        )
    made: types.CodeType = make(*arguments)
    return made


def _python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


class _There:
    """Stands for the namespace of the notebook on the other side."""

    def __reduce__(self) -> tuple[Any, ...]:
        return namespace, ()


class _Unpickler(pickle.Unpickler):
    """Finds what is of this package here, whatever the sender calls the package."""

    def find_class(self, module: str, name: str) -> Any:
        head, dot, tail = module.rpartition(".guest.")
        if head == "warmcell.sandbox" or module.startswith("warmcell_guest."):
            tail = tail if dot else module.partition(".")[2]
            module = f"{__name__.rpartition('.')[0]}.{tail}"
        return super().find_class(module, name)


class _Room:
    """How much may still come of a pickle, and what has; it is written to this."""

    def __init__(self, limit: int | None) -> None:
        self.pieces: list[bytes] = []
        self.left = limit

    def check(self, size: int) -> None:
        """Raise TooLargeError if so much more would be too much."""
        if self.left is not None and size > self.left:
            raise TooLargeError("")

    def take(self, size: int) -> None:
        """So much has come."""
        self.check(size)
        if self.left is not None:
            self.left -= size

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.take(size)
        self.pieces.append(bytes(data))
        return size


def _pack(values: object, limit: int | None, *, there: bool) -> Packed:
    carried = cloudpickle()
    buffers: list[memoryview] = []
    room = _Room(limit)

    def taken(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND_BYTES:
            return True  # inside
        room.take(view.nbytes)
        buffers.append(view)
        return False

    class Pickler(carried.Pickler):  # type: ignore[misc, name-defined, unused-ignore]
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, REFUSED_FILES):
                raise TypeError("cannot pickle an open file")
            room.check(own_bytes(value))  # Before anything of it is copied.
            if there and isinstance(value, types.MethodType) and value.__name__ == "get_ipython":
                return _asks_for_shell, ()  # Which magics in functions call.
            if isinstance(value, types.CodeType):
                make, arguments = self.dispatch_table[types.CodeType](value)[:2]
                return code, (importlib.util.MAGIC_NUMBER, _python(), make, arguments)
            reduced = tensors.reduce(value) or functions.reduce(value)
            return super().reducer_override(value) if reduced is None else reduced

    pickler = Pickler(room, protocol=5, buffer_callback=taken)
    if there:
        pickler.globals_ref[id(namespace())] = _There()
    pickler.dump(values)
    return Packed(b"".join(room.pieces), buffers)


def _travels(value: object, *, there: bool) -> bool:
    try:
        _pack(value, 2**28, there=there)
    except TooLargeError:
        return True
    except Exception:
        return False
    return True


def _mapped(maps: dict[str, memoryview], directory: str, name: str, start: int, size: int) -> memoryview:
    """A part of a file of the run directory; what is written to it is this process's own."""
    if name not in maps:
        with open(os.path.join(directory, name), "rb") as file:
            whole = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        maps[name] = memoryview(whole)
    return maps[name][start : start + size]
