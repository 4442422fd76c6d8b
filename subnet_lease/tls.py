"""The TLS files of a store's connection, and what is wrong when a connection cannot be made with them.

Owns the checks of the files, noticing that they were replaced, and the diagnosis of a refused handshake: grpc says no
more than that there is no connection, so the handshake is tried once more with Python's own `ssl`, which knows why.
"""

import contextlib
import os
import socket
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from subnet_lease.store import StoreConfigInvalid, StoreUnavailable, TlsFailed

HANDSHAKE_S = 2.0
"""Seconds a trial handshake may take."""

_OTHER_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH
_NOT_YET, _EXPIRED = 9, 10  # X509_V_ERR_CERT_NOT_YET_VALID, _CERT_HAS_EXPIRED


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the CA that etcd's certificate is verified with; optionally our own certificate and its key."""

    cafile: str | None
    certfile: str | None
    keyfile: str | None

    def _given(self) -> list[tuple[str, str]]:
        named = (("cafile", self.cafile), ("certfile", self.certfile), ("keyfile", self.keyfile))
        return [(option, path) for option, path in named if path is not None]

    def first_given(self) -> str | None:
        return next((option for option, _ in self._given()), None)

    def check(self) -> None:
        """StoreConfigInvalid names the file that cannot be used."""
        self.context()

    def context(self) -> ssl.SSLContext:
        """A client's context with these files; StoreConfigInvalid names the one that cannot be used."""
        if self.cafile is None:
            raise StoreConfigInvalid("cafile", "missing; https endpoints need the CA that signed etcd's certificate")
        if self.certfile is None and self.keyfile is not None:
            raise StoreConfigInvalid("certfile", "missing, though a key is given")
        if self.keyfile is None and self.certfile is not None:
            raise StoreConfigInvalid("keyfile", "missing, though a certificate is given")
        for option, path in self._given():
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise StoreConfigInvalid(option, f"cannot read {path}: {os.strerror(error.errno or 0)}") from None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(self.cafile)
        except (OSError, ValueError):
            raise StoreConfigInvalid("cafile", f"{self.cafile} holds no certificate") from None
        if self.certfile is not None:
            try:
                # The empty password keeps OpenSSL from asking for one on the terminal.
                context.load_cert_chain(self.certfile, self.keyfile, password=b"")
            except (OSError, ValueError):
                reason = f"{self.certfile} and {self.keyfile} are not a certificate and its unencrypted key"
                raise StoreConfigInvalid("certfile", reason) from None
            ends = _end_of(self.certfile)
            if ends < time.time():
                day = time.strftime("%Y-%m-%d", time.gmtime(ends))
                raise StoreConfigInvalid("certfile", f"{self.certfile} has expired on {day}; renew it")
        return context

    def stamps(self) -> tuple[object, ...]:
        """Changes when a file is replaced or rewritten."""
        stamps: list[object] = []
        for _, path in self._given():
            try:
                found = Path(path).stat()
                stamps.append((found.st_ino, found.st_size, found.st_mtime_ns))
            except OSError:
                stamps.append(None)
        return tuple(stamps)

    def contents(self) -> dict[str, bytes]:
        """The files' contents by option; StoreUnavailable while they are missing or do not fit together."""
        try:
            self.check()
            return {option: Path(path).read_bytes() for option, path in self._given()}
        except StoreConfigInvalid as error:
            raise TlsFailed(str(error)) from None
        except OSError:
            raise StoreUnavailable("the TLS files are being changed") from None

    def ends(self) -> list[tuple[str, float]]:
        """When the certificates in the files end, the first of each: path, and seconds since 1970. Unreadable ones are
        left out.
        """
        found = []
        for path in (self.cafile, self.certfile):
            if path is not None:
                with contextlib.suppress(OSError, ValueError):
                    found.append((path, _end_of(path)))
        return found

    def trouble(self, endpoint: str) -> str | None:
        """Why no TLS connection to `endpoint` comes about, as a clause; None if TLS is not in the way."""
        url = urlsplit(endpoint)
        host, port = url.hostname or "", url.port or 0
        try:
            context = self.context()
            # grpc verifies against the host of the endpoint, be it a name or an address; so does this.
            with (
                socket.create_connection((host, port), HANDSHAKE_S) as plain,
                context.wrap_socket(plain, server_hostname=host) as secured,
            ):
                # A server that dislikes our certificate says so only after the handshake (TLS 1.3).
                secured.recv(1)
        except StoreConfigInvalid as error:
            return str(error)
        except ssl.SSLCertVerificationError as error:
            return _distrust(error, endpoint, host, self.cafile)
        except ssl.SSLError as error:
            if told := _refusal(error.reason or "", endpoint, self.certfile):
                return told
            broken: str | None = f"the TLS handshake with {endpoint} fails"
        except OSError:
            # Nobody listens, or he says nothing: not for want of certificates.
            broken = None
        else:
            return None
        if _answers_in_plain(host, port):
            return f"{endpoint} does not speak TLS; an endpoint without it begins with http://"
        return broken


class Meeting(NamedTuple):
    """What a server showed of itself: the clock in its answer, when its certificate ends; None where it has none.

    Both in seconds since 1970; `asked` and `answered` are this host's clock around the answer.
    """

    asked: float
    answered: float
    date: float | None
    certificate_ends: float | None


def meet(endpoint: str, files: TlsFiles | None) -> Meeting | None:
    """Ask for `/version`, as etcd answers it to everybody; None if nobody answers so. Takes 2 s at most, or 4."""
    url = urlsplit(endpoint)
    host, port = url.hostname or "", url.port or 0
    asked = time.time()
    ends: float | None = None
    try:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.create_connection((host, port), HANDSHAKE_S))
            if files is not None:
                secured = files.context().wrap_socket(connection, server_hostname=host)
                connection = stack.enter_context(secured)
                if certificate := secured.getpeercert():
                    ends = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
            connection.sendall(f"GET /version HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            answer = connection.recv(4096)
    except (OSError, StoreConfigInvalid):
        return None
    date = next((line[5:].strip() for line in answer.split(b"\r\n") if line[:5].lower() == b"date:"), b"")
    try:
        told: float | None = parsedate_to_datetime(date.decode("ascii")).timestamp()
    except ValueError:
        told = None
    return Meeting(asked, time.time(), told, ends)


def _end_of(path: str) -> float:
    """When the first certificate in the file ends, as seconds since 1970.

    The standard library has no other decoder of certificates than the one for its own tests.
    """
    decoded: dict[str, Any] = ssl._ssl._test_decode_cert(path)  # type: ignore[attr-defined]
    return ssl.cert_time_to_seconds(decoded["notAfter"])


def _distrust(error: ssl.SSLCertVerificationError, endpoint: str, host: str, cafile: str | None) -> str:
    """Why we do not accept the server's certificate."""
    if error.verify_code in _OTHER_NAME:
        return f"the certificate of {endpoint} is not for {host}: name the endpoint as its certificate does"
    if error.verify_code == _EXPIRED:
        return f"the certificate of {endpoint}, or the CA's in {cafile}, has expired"
    if error.verify_code == _NOT_YET:
        return f"the certificate of {endpoint} is not valid yet; compare the clocks"
    return f"the certificate of {endpoint} is not signed by the CA in {cafile}"


def _answers_in_plain(host: str, port: int) -> bool:
    """Whether who listens there speaks HTTP without TLS. What it makes of a handshake depends on how it is cut up."""
    try:
        with socket.create_connection((host, port), HANDSHAKE_S) as plain:
            plain.sendall(b"GET /version HTTP/1.0\r\n\r\n")
            return plain.recv(5) == b"HTTP/"
    except OSError:
        return False


def _refusal(reason: str, endpoint: str, certfile: str | None) -> str:
    """Why the server breaks the handshake off, as far as `reason`, which is OpenSSL's, tells; else empty."""
    if "CERTIFICATE_REQUIRED" in reason or ("BAD_CERTIFICATE" in reason and certfile is None):
        return f"{endpoint} wants a client certificate: give --etcd-certfile and --etcd-keyfile"
    if "ALERT" in reason and certfile is not None:
        return f"{endpoint} does not accept the certificate in {certfile}: expired, or of a CA that it does not know"
    return ""
