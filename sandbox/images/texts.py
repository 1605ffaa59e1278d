"""What may stand in a declaration. Nothing of it can be taken for an option, a second line or a variable.

A declaration becomes arguments of pip and apt, lines of a Dockerfile and of a requirements file; each of these has
letters of its own that mean something else there. What holds such letters where they have no business is refused here,
once, so that whoever builds needs to quote but not to doubt.
"""

import re
from urllib.parse import urlsplit

from warmcell.sandbox.errors import InvalidRequestError

TEXT_MAX = 10_000
"""Characters of a command, a variable or a requirement. A line of a Dockerfile has at most 64 KiB, all of it quoted."""

LIST_MAX = 2**20
"""Characters of all that one step installs."""

_VERSION = re.compile(r"3\.(?:9|[1-9]\d)(?:\.\d{1,3})?")
_APT = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9-]+)?(?:=[A-Za-z0-9.+~:-]+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONDA = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._/-]*::)?[A-Za-z0-9_][A-Za-z0-9._-]*(?:[ =<>!~\[].*)?")
_CHANNEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_TOKEN = re.compile(r"(?:^|/)t/[^/]+/")
"""As conda writes one into addresses."""
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_HASH = re.compile(r"\s--hash=(?:sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128})(?=\s|$)")
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*(?::\d{1,5})?"
_REFERENCE = re.compile(
    rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?"
)
_SCHEMES = ("https", "http")
_PRIVATE = "A private index belongs into the operator's configuration: c.Warmcell.index_url, or PIP_INDEX_URL."


def python_version(version: str) -> str:
    """As in "3.12".

    Raises:
        InvalidRequestError: It is none, or older than 3.9.
    """
    if not _VERSION.fullmatch(version):
        raise InvalidRequestError(
            f"{version!r} is no version of Python for an image", hint='Write it as "3.12"; 3.9 is the oldest.'
        )
    return version


def requirement(text: str) -> str:
    """What pip installs, as in "pandas>=2", perhaps with hashes; without the space around it.

    Raises:
        InvalidRequestError: It is no requirement, or names a place that only this machine has.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    text = text.strip()
    if len(text) > TEXT_MAX or not text.isascii() or not text.isprintable() or "${" in text:
        raise _no_requirement(text, "it has letters that no requirement has")
    try:
        asked = Requirement(_HASH.sub("", f" {text}").strip())
    except InvalidRequirement as error:
        raise _no_requirement(text, str(error).splitlines()[0]) from error
    if asked.url is not None:
        url(asked.url.removeprefix("git+"), what=f"The address of {asked.name}")
    return text


def _no_requirement(text: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{text[:80]!r} is no requirement: {why}",
        hint='Write it as in "pandas>=2", "torch==2.8.0" or "name @ https://…/name-1.0-py3-none-any.whl".',
    )


def url(text: str, *, what: str) -> str:
    """An address that anybody may see.

    Raises:
        InvalidRequestError: It is none, or a password is in it.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
        parts = urlsplit("")
    plain = text.isascii() and text.isprintable() and not any(letter in text for letter in " \"'\\${}")
    if not plain or len(text) > TEXT_MAX or parts.scheme not in _SCHEMES or not host or port == 0:
        raise InvalidRequestError(f"{what} is no address: {text[:80]!r}", hint='Begin it with "https://".')
    if "@" in parts.netloc:
        raise InvalidRequestError(f"{what} holds a user or a password, which everybody would see", hint=_PRIVATE)
    return text


def apt_package(text: str) -> str:
    """A Debian package, perhaps with architecture and version: "ffmpeg", "libc6:i386", "git=1:2.39.5-0".

    Raises:
        InvalidRequestError: It is no name of one.
    """
    if not _APT.fullmatch(text) or len(text) > 200:
        raise InvalidRequestError(
            f"{text[:80]!r} is no Debian package",
            hint='Give names as in "ffmpeg" or "git=1:2.39.5-0", each as an argument of its own.',
        )
    return text


def conda_package(text: str) -> str:
    """A package of conda's, perhaps with channel, version and build: "numpy>=2", "conda-forge::ffmpeg=7.1=gpl_*".

    Raises:
        InvalidRequestError: It is none.
    """
    text = text.strip()
    if not _CONDA.fullmatch(text) or not (text.isascii() and text.isprintable()) or len(text) > 500:
        raise InvalidRequestError(
            f"{text[:80]!r} is no package of conda's", hint='Write it as in "numpy>=2" or "conda-forge::ffmpeg=7.1".'
        )
    if channel := text.rpartition("::")[0]:
        conda_channel(channel)
    return text


def conda_name(package: str) -> str:
    """What such a package is called, without channel and version."""
    return re.split(r"[ =<>!~\[]", package.rpartition("::")[2], maxsplit=1)[0].lower()


def conda_channel(text: str) -> str:
    """Where packages of conda's come from: "conda-forge", "pytorch/label/nightly", or an address that anybody may see.

    Raises:
        InvalidRequestError: It is none.
    """
    if _TOKEN.search(text):
        raise InvalidRequestError(
            "The channel holds a token, which everybody would see",
            hint="It belongs into the operator's configuration: c.Warmcell.conda_channel_alias.",
        )
    if "://" in text:
        return url(text, what="The channel")
    if not _CHANNEL.fullmatch(text) or len(text) > 200:
        raise InvalidRequestError(f"{text[:80]!r} is no channel of conda's", hint='Name one: "conda-forge".')
    return text


def command(text: str) -> str:
    """What a shell runs.

    Raises:
        InvalidRequestError: It is empty, or no shell could be given it.
    """
    if not text.strip() or "\0" in text or len(text) > TEXT_MAX or not _encodable(text):
        raise InvalidRequestError(f"{text[:80]!r} is no command", hint="Give a line as you would type it.")
    return text


def variable(name: str, value: str) -> tuple[str, str]:
    """A variable of the environment and what it is set to.

    Raises:
        InvalidRequestError: It has no such name, or the value is not one line.
    """
    if not _VARIABLE.fullmatch(name) or len(name) > 200:
        raise InvalidRequestError(
            f"{name[:80]!r} is no name of an environment variable", hint="Use letters, digits and underscores."
        )
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value) or len(value) > TEXT_MAX:
        raise InvalidRequestError(
            f"The value of {name} is not one line of text", hint="Have a file with it made by `.run(...)` instead."
        )
    if not _encodable(value):
        raise InvalidRequestError(f"The value of {name} is no text", hint="Give what can be encoded as UTF-8.")
    return name, value


def reference(text: str) -> str:
    """What an engine calls an image: "python:3.12-slim", "registry.example.com:5000/team/image@sha256:…".

    Raises:
        InvalidRequestError: It is none.
    """
    if not _REFERENCE.fullmatch(text) or len(text) > 500:
        raise InvalidRequestError(
            f"{text[:80]!r} is no reference of an image", hint='Write it as in "python:3.12-slim".'
        )
    return text


def image_name(text: str) -> str:
    """What people call an image of theirs: "analysis".

    Raises:
        InvalidRequestError: It is none.
    """
    if not _NAME.fullmatch(text):
        raise InvalidRequestError(
            f"{text[:80]!r} cannot be the name of an image",
            hint="Use up to 64 lower-case letters, digits, dots, dashes and underscores.",
        )
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
