"""Where a server is and who asks: read once, before anything is sent there."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from fumehood.config import Config
from fumehood.errors import InvalidInput

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Address:
    """`socket` is the path of a Unix socket, else empty. `prefix` is what stands before /v1 behind a proxy."""

    url: str
    host: str
    port: int
    api_key: str = field(default="", repr=False)
    is_tls: bool = False
    socket: str = ""
    prefix: str = ""

    @classmethod
    def read(cls, url: str, api_key: str = "") -> Address:
        """`http://host:port`, `https://host` or `unix:/path`. Raises InvalidInput for anything else."""
        if not (api_key.isascii() and (api_key.isprintable() or not api_key)) or " " in api_key:
            raise InvalidInput(
                "bad api_key", cause="it has a blank or unprintable character", remediation="copy it again, whole"
            )
        if url.startswith("unix:/"):
            return cls(url, "localhost", 80, api_key, socket=url.removeprefix("unix:"))
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
            host.encode("ascii")
        except (ValueError, KeyError):
            raise _bad(url) from None
        # A key in the address would end up in logs and in shells' histories; a query has no meaning here.
        if not host or parts.username or parts.password or parts.query or parts.fragment or not url.isprintable() or " " in url:
            raise _bad(url)
        return cls(url, host, port, api_key, parts.scheme == "https", prefix=parts.path.rstrip("/"))

    @classmethod
    def of(cls, config: Config, url: str | None, api_key: str | None) -> Address | None:
        """What was named, else what is configured. None: in this process; an empty `url` says that."""
        where = config.url if url is None else url
        return cls.read(where, config.api_key if api_key is None else api_key) if where else None

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS["https" if self.is_tls else "http"] else f"{host}:{self.port}"


def _bad(url: str) -> InvalidInput:
    return InvalidInput(
        f"bad url {url[:80]!r}",
        cause="it names no server, or holds more than its address",
        remediation="http://HOST:PORT, https://HOST or unix:/path; the key goes into api_key",
    )
