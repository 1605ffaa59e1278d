"""Certificates for hosts whose requests the proxy reads, which one sandbox alone trusts."""

import datetime
import functools
import os
import ssl
import tempfile
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID: Final = datetime.timedelta(days=365)
EARLIER: Final = datetime.timedelta(days=2)
"""Clocks of sandboxes that come back may be behind."""


class Authority:
    """Signs for the hosts of one sandbox. Its own key is in this process alone and is never written down.

    Making one takes some milliseconds, and so does each host's first certificate.
    """

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Warmcell sandbox {name}")])
        self._certificate = (
            _draft(subject, subject, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self._contexts: dict[str, ssl.SSLContext] = {}

    @property
    def pem(self) -> bytes:
        """What is to be trusted."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def context(self, host: str) -> ssl.SSLContext:
        """To speak TLS as that host. Blocks for some milliseconds the first time."""
        if host not in self._contexts:
            self._contexts[host] = self._signed(host)
        return self._contexts[host]

    def _signed(self, host: str) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        common = host if len(host) <= 64 else "sandbox"
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
        issuer_key = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        certificate = (
            _draft(subject, self._certificate.subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        # The ssl module reads keys from files alone. This one is of the host's certificate, which one sandbox trusts.
        fd, path = tempfile.mkstemp(prefix="wc-")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(private + certificate.public_bytes(serialization.Encoding.PEM))
            context.load_cert_chain(path)
        finally:
            os.unlink(path)
        return context


@functools.cache
def usual_certificates() -> bytes:
    """The authorities that this process trusts, in PEM. Blocks."""
    paths = ssl.get_default_verify_paths()
    for path in (paths.cafile or "", "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"):
        if path and Path(path).is_file():
            return Path(path).read_bytes()
    return b""


def _draft(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + VALID)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
