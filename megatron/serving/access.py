"""Decide who may ask the server: host names, origins and the key.

A web page that somebody on this network opens can send requests here, though not every kind, and not without naming its origin;
and by a name of its own that comes to mean this machine's address (DNS rebinding) it could even read the replies.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.serving.fields import RequestError, one_line

ANY_NAME = "*"
KEY_VARIABLE = "MEGATRON_API_KEY"
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
PREFLIGHT_SECONDS = 600  # for which a browser may remember the answer to a preflight
AUTHORITY = re.compile(r"(?P<host>\[[0-9a-f:.]{2,45}\]|[^\s:/?#@\[\]]{1,255})(?P<port>:[0-9]{1,5})?", re.IGNORECASE)
ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]{0,30})://(?P<authority>[^\s/?#@]{1,270})", re.IGNORECASE)
DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def parse_host(authority: str) -> str | None:
    """Return the name or address in `name`, `name:port` or `[address]:port`, in small letters; None for anything else."""
    match = AUTHORITY.fullmatch(authority)
    return match["host"].strip("[]").lower().rstrip(".") or None if match else None


def normal_origin(text: str) -> str | None:
    """Return an origin as browsers write it, `https://name:port` or `null`; None for what is none."""
    if text == "null":
        return text
    match = ORIGIN.fullmatch(text)
    if match is None or parse_host(match["authority"]) is None:
        return None
    scheme = match["scheme"].lower()
    return f"{scheme}://{match['authority'].lower().removesuffix(DEFAULT_PORTS.get(scheme, ':'))}"


def is_address(host: str) -> bool:
    """Return whether `host` is an IP address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def machine_names(bound: str) -> frozenset[str]:
    """Return the names under which a server bound to this name or address can be asked for, besides addresses."""
    names = {"localhost", bound.lower(), *(socket.gethostname().lower(),)}
    if bound not in LOOPBACK:
        names.add(socket.getfqdn().lower())  # may ask a name server, so only where others can come
    return frozenset({*names, *(name.partition(".")[0] for name in names if not is_address(name))})


def check_key(flag: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the key that clients must have, None for none; ValueError for one that no client could send."""
    name, key = ("--api-key", flag) if flag is not None else (KEY_VARIABLE, environment.get(KEY_VARIABLE))
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        what = "is empty" if not key else "holds a space or another character that is no visible ASCII"
        raise ValueError(f"{name} {what}: give a key, or take it away to ask for none")
    return key


@dataclass(frozen=True)
class Access:
    """Requirements for a request's headers.

    Attributes:
        hosts: names that are this server's, besides addresses.
        origins: of web pages that may ask.
        key: the API key; None for none.
    """

    hosts: frozenset[str] = LOOPBACK
    origins: frozenset[str] = frozenset()
    key: str | None = None

    @classmethod
    def for_server(cls, bound: str, hosts: Iterable[str] = (), origins: Iterable[str] = (), key: str | None = None) -> Access:
        """Return the requirements of a server.

        Args:
            bound: the name or address that it is bound to.
            hosts: further names that are this server's, `*` for all.
            origins: web pages that may ask, `*` for all.
            key: the API key; None for none.

        Raises:
            ValueError: a host or an origin is none.
        """
        allowed_hosts, allowed_origins = set(machine_names(bound)), set()
        for text in hosts:
            host = ANY_NAME if text == ANY_NAME else parse_host(text)
            if host is None:
                raise ValueError(f"--allow-host {text} is no host; legal: a name, an address, or * for all")
            allowed_hosts.add(host)
        for text in origins:
            origin = ANY_NAME if text == ANY_NAME else normal_origin(text)
            if origin is None:
                raise ValueError(f"--allow-origin {text} is no origin; legal: https://name, http://name:port, null, * for all")
            allowed_origins.add(origin)
        return cls(frozenset(allowed_hosts), frozenset(allowed_origins), key)

    def check_host(self, given: Sequence[str]) -> str:
        """Return the host that is asked for, "" where none is named; RequestError for another's."""
        if not given:
            return ""  # HTTP/1.0, which no browser speaks
        host = parse_host(given[0])
        if host is None or not (ANY_NAME in self.hosts or host in self.hosts or is_address(host)):
            raise RequestError(
                f"the request is for the host {given[0]!r}, which is not known as this server's: --allow-host lets it in",
                status=403,
            )
        return host

    def check_origin(self, given: Sequence[str], host: str) -> str | None:
        """Return the origin to be named in the reply, None where no page asks; RequestError for a foreign one.

        The server's own are those on its host, on this machine's names, and on the loopback addresses, with any port.
        """
        if not given:
            return None
        origin = normal_origin(given[0]) if len(given) == 1 else None
        match = ORIGIN.fullmatch(origin or "")
        name = parse_host(match["authority"]) if match else None
        own = name is not None and (name in (self.hosts | LOOPBACK) - {ANY_NAME} or name == host)
        if origin is None or not (own or self.origins & {origin, ANY_NAME}):
            shown = ", ".join(given)
            raise RequestError(f"the page at {shown!r} may not ask this server: --allow-origin lets it in", status=403)
        return given[0]

    def check_authorization(self, given: Sequence[str]) -> None:
        """Raise RequestError for a wrong or missing key, in a time that does not tell how much of it is right."""
        if self.key is None:
            return
        scheme, _, sent = given[0].partition(" ") if given else ("", "", "")
        digests = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in (self.key, sent.strip(" "))]
        if scheme.lower() != "bearer" or not hmac.compare_digest(*digests):
            what = "the API key is wrong" if given else "an API key is needed"
            raise RequestError(f"{what}: send the header 'Authorization: Bearer KEY'", status=401, code="invalid_api_key")


def with_access_checks(app: Any, access: Access, log: Callable[[str], object]) -> Any:
    """Return an ASGI application behind these checks, with the headers by which browsers hear about allowed origins.

    Args:
        app: the application.
        access: the checks.
        log: gets a line for each request that is refused here.
    """
    from starlette.responses import JSONResponse, Response

    async def gate(scope: Any, receive: Any, send: Any) -> None:
        def header(name: bytes) -> list[str]:
            return [value.decode("latin-1") for key, value in scope["headers"] if key == name]

        origin = None
        try:
            host = access.check_host(header(b"host"))
            origin = access.check_origin(header(b"origin"), host)
            asked = header(b"access-control-request-method")
            if scope["method"] == "OPTIONS" and origin is not None and asked:
                private = header(b"access-control-request-private-network")
                headers = _preflight(header(b"access-control-request-headers"), private)
                await Response(status_code=204, headers=headers)(scope, receive, _naming(origin, send))
                return
            # A load balancer asks for the health, and has no key.
            if scope["path"] != "/health":
                access.check_authorization(header(b"authorization"))
        except RequestError as error:
            client = scope["client"][0] if scope["client"] else "?"
            log(f"{client} {one_line(scope['method'] + ' ' + scope['path'])}: status {error.status}, {one_line(str(error))}")
            challenge = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
            await JSONResponse(error.body(), error.status, challenge)(scope, receive, _naming(origin, send))
            return
        await app(scope, receive, _naming(origin, send))

    return gate


def _preflight(asked: Sequence[str], private_network: Sequence[str]) -> dict[str, str]:
    """Return headers of the answer to a browser that asks before it sends a page's request (CORS preflight)."""
    names = [name.strip() for name in ",".join(asked).split(",")]
    named = [name for name in names if re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", name)]
    return {
        "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, OPTIONS",
        "Access-Control-Allow-Headers": ", ".join(named) or "authorization, content-type",
        "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
        **({"Access-Control-Allow-Private-Network": "true"} if private_network else {}),
    }


def _naming(origin: str | None, send: Any) -> Any:
    """Return `send` with the headers by which a browser hands a reply to the page."""
    if origin is None:
        return send

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            named = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
            message = {**message, "headers": [*message.get("headers", []), *named]}
        await send(message)

    return sending
