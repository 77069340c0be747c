"""TLS without authorities: every node makes its own certificate, its signed record vouches for it, callers pin it.

EC P-256, because gRPC's TLS refuses Ed25519 certificates.
"""

from __future__ import annotations

import asyncio
import datetime
import ssl
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from farflung.protocol import limits
from farflung.protocol.errors import PeerError

SERVER_NAME = "farflung"
"""The one name in every certificate: callers check the pin, not where the node happens to be."""

_VALID_FROM = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_VALID_UNTIL = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)


class Tls(NamedTuple):
    """A certificate and its private key, both PEM."""

    certificate_pem: bytes
    key_pem: bytes

    @property
    def certificate_der(self) -> bytes:
        """What goes into the peer record."""
        return x509.load_pem_x509_certificate(self.certificate_pem).public_bytes(Encoding.DER)


def make_tls() -> Tls:
    """A new self-signed certificate and key. Its dates are wide: the pin is what counts, clocks may be off."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_UNTIL)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Tls(
        certificate.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


def der_to_pem(certificate_der: bytes) -> bytes:
    """PEM of a certificate that came in a record. The bytes are not parsed here: a wrong one fails the handshake."""
    return ssl.DER_cert_to_PEM_cert(certificate_der).encode("ascii")


async def fetch_certificate(host: str, port: int, *, deadline_s: float) -> bytes:
    """The DER certificate a server presents, believed by nobody yet.

    Raises TimeoutError or ConnectionError when there is no server, PeerError when what answers does not speak TLS.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(deadline_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=SERVER_NAME)
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    except ssl.SSLError as error:
        raise PeerError("?", f"{host}:{port} does not speak TLS: {error.reason or error}") from None
    except TimeoutError:
        raise TimeoutError(f"{host}:{port} presented no certificate within {deadline_s:.1f} s") from None
    except OSError as error:
        raise ConnectionError(f"cannot reach {host}:{port}: {error}") from None
    finally:
        if writer is not None:
            writer.transport.abort()
    if not certificate or len(certificate) > limits.RECORD_BYTES_MAX:
        raise PeerError("?", f"{host}:{port} presented a certificate of {len(certificate or b'')} bytes")
    return bytes(certificate)
