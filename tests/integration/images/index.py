"""A package index that asks for a password, with a certificate that nobody else trusts, and one tiny package.

Beside it are channels of conda's, where a test has made some.
"""

import base64
import contextlib
import hashlib
import importlib.metadata
import io
import re
import ssl
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import trustme

USER, PASSWORD = "builder", "hunter2-never-in-an-image"
PACKAGE = "wctiny"


class PrivateIndex:
    """Serves PACKAGE 1.0 and 2.0, and pip itself not."""

    def __init__(self, directory: Path) -> None:
        self.certificate = directory / "certificate.pem"
        self.requests: list[str] = []
        self.channels = directory / "channels"
        self._public: set[str] = set()
        self.wheels = [plain_wheel(PACKAGE, version, directory) for version in ("1.0", "2.0")]
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.certificate)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        """With its password."""
        return f"https://{USER}:{PASSWORD}@127.0.0.1:{self._server.server_port}/simple"

    @property
    def channel_alias(self) -> str:
        """Where its channels are, with its password."""
        return f"https://{USER}:{PASSWORD}@127.0.0.1:{self._server.server_port}/conda"

    @property
    def token_alias(self) -> str:
        """The same, with a token in its address."""
        return f"https://127.0.0.1:{self._server.server_port}/t/{PASSWORD}/conda"

    def public(self, file: Path) -> str:
        """The address of one of its files, which needs no password from now on."""
        self._public.add(f"/files/{file.name}")
        return f"https://127.0.0.1:{self._server.server_port}/files/{file.name}"

    def close(self) -> None:
        """There is no such index any more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        index = self
        right = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.requests.append(self.path)
                path = self.path.removeprefix(f"/t/{PASSWORD}")
                if self.headers["Authorization"] != right and path == self.path and path not in index._public:
                    self._answer(401, b"", {"WWW-Authenticate": 'Basic realm="index"'})
                elif self.path in {f"/simple/{_project(wheel)}/" for wheel in index.wheels}:
                    links = "".join(
                        f'<a href="/files/{wheel.name}#sha256={hashlib.sha256(wheel.read_bytes()).hexdigest()}">'
                        f"{wheel.name}</a>"
                        for wheel in index.wheels
                        if self.path == f"/simple/{_project(wheel)}/"
                    )
                    self._answer(200, f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), {})
                elif found := [wheel for wheel in index.wheels if self.path == f"/files/{wheel.name}"]:
                    self._answer(200, found[0].read_bytes(), {"Cache-Control": "max-age=3600, immutable"})
                elif path.startswith("/conda/") and (file := index.channels / path[7:]).is_file():
                    self._answer(200, file.read_bytes(), {})
                else:
                    self._answer(404, b"", {})

            def do_HEAD(self) -> None:
                self.do_GET()

            def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": "text/html", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(ConnectionError, ssl.SSLEOFError):  # It had read enough.
                    self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None: ...

        return Handler

    def __enter__(self) -> "PrivateIndex":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.close()


def _project(wheel: Path) -> str:
    return wheel.name.split("-")[0].replace("_", "-")


def wheel_of(distribution: str, directory: Path) -> Path:
    """The wheel that an installed distribution came from, but for what its installer noted."""
    found = importlib.metadata.distribution(distribution)
    files = [file for file in found.files or () if file.name not in {"INSTALLER", "REQUESTED", "direct_url.json"}]
    told = re.findall(r"^Tag: (\w+)-(\w+)-(.+)$", found.read_text("WHEEL") or "", re.MULTILINE)
    tags = "-".join(".".join(dict.fromkeys(part)) for part in zip(*told, strict=True))
    path = directory / f"{distribution.replace('-', '_')}-{found.version}-{tags}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in files:
            if "__pycache__" not in file.parts:
                wheel.write(found.locate_file(file), str(file))
    return path


def plain_wheel(name: str, version: str, directory: Path) -> Path:
    """One of a package that knows its version, and no more."""
    path = directory / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{about}/RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def source_of(name: str, directory: Path, *, hook: str) -> Path:
    """A source distribution that runs these lines of Python as it is built, and becomes an empty package."""
    backend = f"""
import os, zipfile
{hook}
def build_wheel(directory, settings=None, metadata=None):
    with zipfile.ZipFile(os.path.join(directory, "{name}-1.0-py3-none-any.whl"), "w") as wheel:
        about = "{name}-1.0.dist-info"
        wheel.writestr("{name}.py", "")
        wheel.writestr(about + "/METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\n")
        wheel.writestr(about + "/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(about + "/RECORD", "")
    return "{name}-1.0-py3-none-any.whl"
"""
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n'
        f'[project]\nname = "{name}"\nversion = "1.0"\n',
        "own.py": backend,
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
    }
    path = directory / f"{name}-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{name}-1.0/{file}")
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    return path


@contextlib.contextmanager
def private_index(directory: Path) -> Iterator[PrivateIndex]:
    """One that listens."""
    with PrivateIndex(directory) as index:
        yield index


def holds(directory: Path, secret: str) -> list[str]:
    """Files of a tree that hold a secret, or have it in their name."""
    found = []
    for path in directory.rglob("*"):
        said = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        if secret in path.name or secret.encode() in said:
            found.append(str(path))
    return found
