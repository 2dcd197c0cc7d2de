"""Certificates made on the spot: self-signed as a real server's is as a rule, or signed by a CA."""

from __future__ import annotations

import ipaddress
import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


@dataclass(frozen=True, slots=True)
class Certificate:
    """`fingerprint`: SHA-256 of the leaf, hex pairs with colons; `ca`: the CA's certificate as PEM, if a CA
    has signed the leaf."""

    fingerprint: str
    ca: str | None
    _leaf: bytes
    _key: bytes

    def context(self) -> ssl.SSLContext:
        """The server's side of TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as directory:
            leaf, key = Path(directory, "leaf.pem"), Path(directory, "key.pem")
            self.write(leaf, key)
            context.load_cert_chain(leaf, key)
        return context

    def write(self, leaf: Path, key: Path) -> None:
        """Writes the certificate and its key as PEM."""
        leaf.write_bytes(self._leaf)
        key.write_bytes(self._key)


def make(*, ca_signed: bool = False) -> Certificate:
    """A certificate for `localhost`; one that is self-signed is for 127.0.0.1 and ::1 too."""
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    key = ec.generate_private_key(ec.SECP256R1())
    if ca_signed:
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca = _sign("reference CA", ca_key.public_key(), "reference CA", ca_key, is_ca=True)
        leaf = _sign("localhost", key.public_key(), "reference CA", ca_key, names=names)
    else:
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in ("127.0.0.1", "::1")]
        ca = None
        leaf = _sign("localhost", key.public_key(), "localhost", key, names=names)
    return Certificate(
        fingerprint=leaf.fingerprint(hashes.SHA256()).hex(":"),
        ca=None if ca is None else ca.public_bytes(Encoding.PEM).decode(),
        _leaf=leaf.public_bytes(Encoding.PEM),
        _key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


def _sign(
    subject: str,
    public_key: ec.EllipticCurvePublicKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    names: list[x509.GeneralName] | None = None,
    is_ca: bool = False,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=is_ca,
                crl_sign=is_ca,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
