"""Languages other than Python in a context: each has an interpreter of its own below the context's process.

`run` is called by the cell that is run for such code. The interpreter is started by the first and keeps its variables
for the next; what it prints is shown as the cell's output, the value of its last expression as the cell's.

The driver beside this file that an interpreter runs reads requests from one pipe and answers on another: both are lists
of texts, a line with their number and then for each a line with its length in bytes and the text, which needs no
library in any language. A request is the code and then what has changed in the environment, `NAME=value` or a `NAME`
that is gone. An answer is `ok` and the values that are shown, or `error`, name, value and trace.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

DRIVERS = os.path.dirname(__file__)
COMMANDS = {
    "bash": ("bash", os.path.join(DRIVERS, "driver.bash")),
    "java": ("java", os.path.join(DRIVERS, "Driver.java")),
    "javascript": ("node", os.path.join(DRIVERS, "driver.js")),
    "r": ("Rscript", "--vanilla", os.path.join(DRIVERS, "driver.R")),
    "typescript": ("node", os.path.join(DRIVERS, "driver.js"), "--typescript"),
}
PLAINLY = ("FORCE_COLOR", "CLICOLOR_FORCE")
"""Kernels ask programs for colours, since pages show them; who asks for other languages does not."""

TOLD_ALL = ("java",)
"""Their code sees what it is told, not what the interpreter's process has."""

PIECE_BYTES = 65536
INTERRUPT_S = 2.0
"""How long an interpreter has to answer once it is interrupted. After that it is ended, with its variables."""

END_S = 5.0

_interpreters: dict[str, Interpreter] = {}


class Shown:
    """A value that another language shows as this text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


class LanguageError(Exception):
    """Base of what code in another language raises; each is of a class that has the name it has there."""

    trace: str = ""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of Python's own frames."""
        return self.trace.splitlines() or [f"{type(self).__name__}: {self}"]


class Interpreter:
    """One that runs."""

    def __init__(self, language: str) -> None:
        """Start it.

        Raises:
            RuntimeError: Its program is not there.
        """
        command = COMMANDS[language]
        if shutil.which(command[0]) is None:
            raise RuntimeError(f"{language} needs {command[0]}, which this sandbox has not: take an image with it")
        environment = _environment()
        self._known = {} if language in TOLD_ALL else environment
        """The variables that it has been told."""
        its_requests, self._requests = os.pipe()
        self._answers, its_answers = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*command, str(its_requests), str(its_answers)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(its_requests, its_answers),
                env=environment,
            )
        except BaseException:
            os.close(self._requests)
            os.close(self._answers)
            raise
        finally:
            os.close(its_requests)
            os.close(its_answers)
        os.set_blocking(self._requests, False)
        os.set_blocking(self._answers, False)
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        """Tells of its end: what it has started may have its pipes, and outlive it. Not every sandbox has pidfds."""
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        try:
            self._waiter.start()
        except BaseException:  # There may be no room for one more thread.
            self.end()
            raise
        decode = codecs.getincrementaldecoder("utf-8")
        self._streams = {}
        for name in ("stdout", "stderr"):
            descriptor = getattr(self._process, name).fileno()
            os.set_blocking(descriptor, False)
            self._streams[descriptor] = (name, decode("replace"))

    def run(self, code: str) -> list[str]:
        """What it shows of some code; meanwhile its output comes.

        Raises:
            LanguageError: The code failed.
            KeyboardInterrupt: It was interrupted.
            EOFError: The interpreter has ended, or does not answer when it is interrupted.
        """
        if "\0" in code:  # Which no shell reads.
            raise _error("SyntaxError", "The code has a NUL character", "")
        try:
            code.encode(errors="surrogateescape")
        except UnicodeEncodeError:
            raise _error("SyntaxError", "The code has half of a surrogate pair, which is no character", "") from None
        now = _environment()
        gone = [name for name in self._known if name not in now]
        changed = [f"{name}={value}" for name, value in now.items() if self._known.get(name) != value]
        self._known = now
        answer = _Answer()
        try:
            self._tell([code, *gone, *changed])
            kind, *rest = self._answer(answer, None)
        except KeyboardInterrupt:  # It has got that signal, too.
            try:
                self._answer(answer, INTERRUPT_S)
            except (KeyboardInterrupt, ValueError):  # What it says later would be taken for another code's answer.
                raise EOFError from None
            raise
        except ValueError:  # What has come is no answer, and nobody knows where the next one begins.
            raise EOFError from None
        if kind == "error":
            raise _error(*rest)
        return rest

    def end(self) -> int:
        """End it, if it has not ended; its exit code."""
        for descriptor in (self._requests, self._answers):
            os.close(descriptor)
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self._process.wait(END_S)
        if self._waiter.ident is not None:
            self._waiter.join(END_S)
        os.close(self._end)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        return code

    def _wait(self) -> None:
        self._process.wait()
        os.eventfd_write(self._end, 1)

    def _tell(self, texts: Sequence[str]) -> None:
        """A request is longer than a pipe may be, and whoever is to read it may print meanwhile."""
        left = memoryview(b"%d\n" % len(texts) + b"".join(_framed(text) for text in texts))
        while left:
            ready = self._ready([*self._streams, self._end], [self._requests])
            self._pass_on(ready)
            if self._end in ready:
                raise EOFError
            if self._requests in ready:
                try:
                    left = left[os.write(self._requests, left[:PIECE_BYTES]) :]
                except BrokenPipeError:
                    raise EOFError from None

    def _answer(self, answer: _Answer, timeout: float | None) -> list[str]:
        """Its answer, of which there may be a part, when all that it has printed before has been shown.

        Raises:
            EOFError: It has ended, or does not answer in time.
            ValueError: What it has written is no answer.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = self._ready([*self._streams, self._answers, self._end], [], left)
            if not ready or (left == 0.0 and self._answers not in ready):  # It may print for ever.
                raise EOFError
            self._pass_on(ready)
            if self._answers in ready and answer.feed(os.read(self._answers, PIECE_BYTES)):
                self._show_rest()
                return answer.texts
            if self._end in ready and self._answers not in ready:
                self._show_rest()
                raise EOFError

    def _show_rest(self) -> None:
        while ready := self._ready(list(self._streams), [], 0):
            self._pass_on(ready)

    def _ready(self, reading: Sequence[int], writing: Sequence[int], timeout: float | None = None) -> set[int]:
        """Which of these descriptors something can be done with. In seconds; None: until one can."""
        poll = select.poll()
        for descriptor in reading:
            poll.register(descriptor, select.POLLIN)
        for descriptor in writing:
            poll.register(descriptor, select.POLLOUT)
        return {descriptor for descriptor, _ in poll.poll(None if timeout is None else timeout * 1000)}

    def _pass_on(self, ready: set[int]) -> None:
        """Show what has come."""
        for descriptor in ready & self._streams.keys():
            name, decoder = self._streams[descriptor]
            piece = os.read(descriptor, PIECE_BYTES)
            if not piece:
                del self._streams[descriptor]  # Else it would be readable for ever.
            getattr(sys, name).write(decoder.decode(piece, not piece))


class _Answer:
    """An answer, as its pieces come."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._unread = bytearray()
        self._count = self._length = -1

    def feed(self, piece: bytes) -> bool:
        """Whether it is whole now.

        Raises:
            EOFError: Nothing more comes.
            ValueError: It is none.
        """
        if not piece:
            raise EOFError
        self._unread += piece
        while True:
            if self._count < 0 or (self._length < 0 and len(self.texts) < self._count):
                end = self._unread.find(b"\n")
                if end < 0:
                    return False
                number = int(self._unread[:end])
                del self._unread[: end + 1]
                if self._count < 0:
                    self._count = number
                else:
                    self._length = number
            elif len(self.texts) == self._count:
                return True
            elif len(self._unread) < self._length:
                return False
            else:
                self.texts.append(self._unread[: self._length].decode(errors="replace"))
                del self._unread[: self._length]
                self._length = -1


def run(language: str, code: str) -> Shown | None:
    """Run code in a language of `COMMANDS`; what the cell shows as its value.

    Raises:
        LanguageError: The code failed, or has ended its interpreter.
        RuntimeError: There is no such interpreter in this sandbox.
        KeyboardInterrupt: It was interrupted.
    """
    from IPython.display import display

    if language not in _interpreters:
        _interpreters[language] = Interpreter(language)
    interpreter = _interpreters[language]
    try:
        with _lost_with_its_end(language):
            shown = interpreter.run(code)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    for text in shown[:-1]:
        display(Shown(text))  # type: ignore[no-untyped-call]
    return Shown(shown[-1]) if shown else None


@contextlib.contextmanager
def _lost_with_its_end(language: str) -> Iterator[None]:
    """Forget an interpreter that ends within this: the next code begins with another."""
    try:
        yield
    except EOFError:
        code = _interpreters.pop(language).end()
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        raise _error("InterpreterEnded", f"{language} has ended ({how}); its variables are gone", "") from None


def _error(name: str, value: str, trace: str) -> LanguageError:
    kind: Any = type(name if name.isidentifier() else "Error", (LanguageError,), {})
    error: LanguageError = kind(value)
    error.trace = trace
    return error


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in PLAINLY}


def _framed(text: str) -> bytes:
    data = text.encode(errors="surrogateescape")
    return b"%d\n" % len(data) + data
