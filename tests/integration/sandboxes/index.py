"""A package index of the operator's own on loopback: HTTPS, with a password, and one package."""

import base64
import contextlib
import http.server
import io
import ssl
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trustme

WHEEL = "warmcell_planted-1.0-py3-none-any.whl"
PASSWORD = "p@ss"


@dataclass
class PackageServer:
    """What it is reached by, and what it was asked."""

    port: int = 0
    certificate: Path = Path()
    asked: list[str] = field(default_factory=list)
    refused: int = 0

    @property
    def url(self) -> str:
        """With the password, as the operator has it."""
        return f"https://ann:{PASSWORD.replace('@', '%40')}@localhost:{self.port}/simple"

    @property
    def place(self) -> str:
        """Without."""
        return f"https://localhost:{self.port}"


def wheel() -> bytes:
    """A package of one module."""
    info = "warmcell_planted-1.0.dist-info"
    files = {
        "warmcell_planted.py": "HERE = 'planted'\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: warmcell-planted\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return packed.getvalue()


@contextlib.contextmanager
def package_server(directory: Path) -> Iterator[PackageServer]:
    """Serve, with a certificate in that directory to check it against."""
    server, content = PackageServer(certificate=directory / "index.pem"), wheel()
    wanted = "Basic " + base64.b64encode(f"ann:{PASSWORD}".encode()).decode()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.asked.append(self.path)
            pages = {
                "/simple/warmcell-planted/": f'<a href="/files/{WHEEL}">{WHEEL}</a>'.encode(),
                f"/files/{WHEEL}": content,
                "/hello": b"hello",
            }
            status, body = (200, pages[self.path]) if self.path in pages else (404, b"")
            if self.headers.get("Authorization") != wanted:
                server.refused += 1
                status, body = 401, b""
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Tests say what went wrong."""

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(server.certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        serving.socket = context.wrap_socket(serving.socket, server_side=True)
        server.port = serving.server_address[1]
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            serving.shutdown()
            thread.join()
