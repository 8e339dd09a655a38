"""Certificates of a cluster, made for a test."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from workers.transport.grpc.credentials import TLS_NAME, Tls

_DAY = datetime.timedelta(days=1)


class Authority:
    """Issues certificates. Two authorities do not trust each other."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._certificate("authority", self._key, None)

    def write(self, directory: Path, name: str = TLS_NAME) -> Tls:
        """A certificate for `name` and its key, as files that replace those of an earlier call."""
        key = ec.generate_private_key(ec.SECP256R1())
        pem = serialization.Encoding.PEM
        plain = serialization.NoEncryption()
        contents = {
            "cert.pem": self._certificate(name, key, name).public_bytes(pem),
            "key.pem": key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain),
            "ca.pem": self.certificate.public_bytes(pem),
        }
        directory.mkdir(exist_ok=True)
        for file, content in contents.items():
            (directory / file).write_bytes(content)
        return Tls(*(directory / file for file in contents))

    def _certificate(self, name: str, key: ec.EllipticCurvePrivateKey, dns: str | None) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
            .add_extension(x509.BasicConstraints(ca=dns is None, path_length=None), critical=True)
        )
        if dns is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(dns)]), critical=False)
        return builder.sign(self._key, hashes.SHA256())
