"""What builds images: the port of every builder, and what is built and configured."""

import re
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from warmcell.sandbox.errors import ImageBuildError, StorageFullError, WarmcellError
from warmcell.sandbox.images.image import Image

TAIL_LINES = 100
"""Last lines of a build's output that its error carries."""
LINE_MAX = 2000
"""Characters of a line of output."""

Tell = Callable[[str], None]
"""Gets each line of a build's output as it comes."""

_COLOUR = re.compile("\x1b\\[[0-9;]*[A-Za-z]")
_FULL = ("no space left on device", "disk quota exceeded", "[errno 28]", "os error 28")
_CONDA = ("CONDA_CHANNEL_ALIAS", "CONDA_OVERRIDE_CUDA", "CONDA_OVERRIDE_GLIBC")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageIndex:
    """Where packages come from, as the operator says. No image and no digest has anything of it."""

    url: str = ""
    """Empty: PyPI."""
    extra_urls: tuple[str, ...] = ()
    certificate: Path | None = None
    """A file of certificates in PEM that servers are checked against."""
    proxies: Mapping[str, str] = field(default_factory=dict)
    conda: Mapping[str, str] = field(default_factory=dict)
    """Variables of conda's: where channels are, and what the machine is taken to have."""

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str], *, url: str = "", certificate: str = "", channels: str = ""
    ) -> "PackageIndex":
        """What was configured, and for the rest what pip and conda would read from the environment."""
        certificate = certificate or environ.get("PIP_CERT", "")
        return cls(
            url=url or environ.get("PIP_INDEX_URL", ""),
            extra_urls=() if url else tuple(environ.get("PIP_EXTRA_INDEX_URL", "").split()),
            certificate=Path(certificate) if certificate else None,
            conda={
                **{name: environ[name] for name in _CONDA if environ.get(name)},
                **({"CONDA_CHANNEL_ALIAS": channels} if channels else {}),
            },
            proxies={name: environ[name] for upper in _PROXIES for name in (upper, upper.lower()) if environ.get(name)},
        )

    @property
    def private(self) -> bool:
        """Whether there is something that must not be in an image."""
        return bool(self.url or self.extra_urls or self.certificate)

    def variables(self, certificate: str) -> dict[str, str]:
        """What every step reads (pip, uv, and whatever it starts), where the certificates are at that path."""
        found = {
            "PIP_INDEX_URL": self.url,
            "UV_DEFAULT_INDEX": self.url,
            "PIP_EXTRA_INDEX_URL": " ".join(self.extra_urls),
            "UV_INDEX": " ".join(self.extra_urls),
        }
        if self.certificate is not None:
            found |= dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO"), certificate)
        return {**{name: value for name, value in found.items() if value}, **self.proxies}


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An image that is there."""

    digest: str
    """Of its declaration."""
    reference: str
    """What backends take: an environment's directory, or an engine's id of the image."""
    python: str
    """Path of its interpreter in sandboxes; empty where nobody has said."""
    size_bytes: int


class ImageBuilder(Protocol):
    """One way to build. `ImageCache` sees to it that an image is built once at a time."""

    name: str
    references: bool
    """Whether its backends also take images that were not built here, as an engine calls them."""

    async def open(self, known: Collection[str] | None) -> None:
        """Called once before all else: remove what a killed keeper left.

        Args:
            known: Digests of the images that are kept; others may go. None: that is not known.
        """

    def check(self, image: Image) -> None:
        """See that it can build that; nothing is made.

        Raises:
            UnsupportedOperationError: A step or the base is not for this builder.
        """

    async def find(self, digest: str) -> Built | None:
        """The image of that digest, if it is there and whole.

        Raises:
            BackendUnavailableError: Whoever keeps images cannot be asked.
        """

    async def build(self, image: Image, *, tell: Tell, again: bool = False) -> Built:
        """Build it. What fails or is cancelled leaves nothing that `find` would find.

        Args:
            image: What is declared, without a name of another image in it.
            tell: Gets each line of output; a step's first one is "[2/5] …".
            again: Take nothing from an earlier build.

        Raises:
            ImageBuildError: A step failed; `details` has `step`, `exit_code` and the last lines of `output`.
            StorageFullError: The disk is full.
            BackendUnavailableError: A tool is missing.
        """

    async def remove(self, digest: str) -> None:
        """Remove it. Idempotent.

        Raises:
            ConflictError: A container of somebody else's uses it.
        """


class Output:
    """A build's output: told line by line, its end kept for an error."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._rest = ""
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)

    def line(self, text: str) -> None:
        """A whole line."""
        text = _COLOUR.sub("", text[:LINE_MAX])
        self._lines.append(text)
        self._tell(text)

    def feed(self, content: bytes) -> None:
        """More output, lines broken anywhere."""
        *lines, self._rest = (self._rest + content.decode(errors="replace")).replace("\r\n", "\n").split("\n")
        for line in lines:
            self.line(line.rpartition("\r")[2])
        if len(self._rest) > LINE_MAX:
            self.end()

    def end(self) -> None:
        """There is no more of it."""
        if self._rest:
            self.line(self._rest.rpartition("\r")[2])
        self._rest = ""

    def error(self, step: str, why: str, *, exit_code: int | None = None) -> WarmcellError:
        """What failed, with its last words."""
        details = {"step": step, "exit_code": exit_code, "output": "\n".join(self._lines)}
        if any(sign in f"{details['output']}\n{why}".lower() for sign in _FULL):
            return full(details)
        return ImageBuildError(
            f"The image could not be built: {step}: {why}",
            hint="Its output says why. Mend that step and build again.",
            details=details,
        )


def full(details: Mapping[str, object] | None = None) -> StorageFullError:
    """There is no room for an image."""
    return StorageFullError(
        "The image could not be built: the disk is full",
        hint="Remove images with `warmcell images rm`, or free space where they are kept.",
        details=details,
    )
