"""Check each request's Host, Origin and API key.

A web page opened by anyone on this network can send some kinds of requests to the server, with the page's origin as a header.
If the page's own host name is made to resolve to this machine's address (DNS rebinding), it could even read the replies.
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

ANY = "*"  # permits any host or origin
KEY_VARIABLE = "MEGATRON_API_KEY"
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
PREFLIGHT_SECONDS = 600  # how long a browser may cache the answer to a preflight request
AUTHORITY = re.compile(r"(?P<host>\[[0-9a-f:.]{2,45}\]|[^\s:/?#@\[\]]{1,255})(?P<port>:[0-9]{1,5})?", re.IGNORECASE)
ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]{0,30})://(?P<authority>[^\s/?#@]{1,270})", re.IGNORECASE)
DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def parse_host(authority: str) -> str | None:
    """Return the host in `name`, `name:port` or `[address]:port`, in lower case; None if the text has another form."""
    match = AUTHORITY.fullmatch(authority)
    return match["host"].strip("[]").lower().rstrip(".") or None if match else None


def normalize_origin(text: str) -> str | None:
    """Return an origin as browsers write it, `https://name:port` without a default port, or `null`; None if it is invalid."""
    if text == "null":
        return text
    match = ORIGIN.fullmatch(text)
    if match is None or parse_host(match["authority"]) is None:
        return None
    scheme = match["scheme"].lower()
    return f"{scheme}://{match['authority'].lower().removesuffix(DEFAULT_PORTS.get(scheme, ':'))}"


def is_address(host: str) -> bool:
    """Return whether `host` is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def machine_names(bound: str) -> frozenset[str]:
    """Return the host names under which clients may reach a server that is bound to this name or address."""
    names = {"localhost", bound.lower(), socket.gethostname().lower()}
    if bound not in LOOPBACK:
        names.add(socket.getfqdn().lower())  # may query a DNS server, so only if other hosts can connect
    return frozenset({*names, *(name.partition(".")[0] for name in names if not is_address(name))})


def check_key(flag: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the API key of the flag or else the environment, None if neither is set; ValueError if it cannot be sent."""
    name, key = ("--api-key", flag) if flag is not None else (KEY_VARIABLE, environment.get(KEY_VARIABLE))
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        what = "is empty" if not key else "contains a space or another character that is not visible ASCII"
        raise ValueError(f"{name} {what}: give another key, or leave {name} out to require none")
    return key


@dataclass(frozen=True)
class Access:
    """Requirements for a request's headers.

    Attributes:
        hosts: the server's names; IP addresses are always allowed.
        origins: origins of web pages that may send requests.
        key: the API key; None if none is required.
    """

    hosts: frozenset[str] = LOOPBACK
    origins: frozenset[str] = frozenset()
    key: str | None = None

    @classmethod
    def for_server(cls, bound: str, hosts: Iterable[str] = (), origins: Iterable[str] = (), key: str | None = None) -> Access:
        """Return the requirements of a server.

        Args:
            bound: the name or address that the server is bound to.
            hosts: further names of the server, `*` for all.
            origins: origins of web pages that may send requests, `*` for all.
            key: the API key; None if none is required.

        Raises:
            ValueError: a host or an origin is invalid.
        """
        allowed_hosts, allowed_origins = set(machine_names(bound)), set()
        for text in hosts:
            host = ANY if text == ANY else parse_host(text)
            if host is None:
                raise ValueError(f"--allow-host {text} is not a host; legal: a name, an address, or * for all")
            allowed_hosts.add(host)
        for text in origins:
            origin = ANY if text == ANY else normalize_origin(text)
            if origin is None:
                raise ValueError(
                    f"--allow-origin {text} is not an origin; legal: https://name, http://name:port, null, * for all"
                )
            allowed_origins.add(origin)
        return cls(frozenset(allowed_hosts), frozenset(allowed_origins), key)

    def check_host(self, values: Sequence[str]) -> str:
        """Return the host from the values of the Host header, "" without one; RequestError if it is not this server's."""
        if not values:
            return ""  # only HTTP/1.0 permits this, which browsers do not use
        host = parse_host(values[0])
        if host is None or not (ANY in self.hosts or host in self.hosts or is_address(host)):
            raise RequestError(
                f"the request is for the host {values[0]!r}, which is not known as this server's: --allow-host permits it",
                status=403,
            )
        return host

    def check_origin(self, values: Sequence[str], host: str) -> str | None:
        """Check the origin of the page that sent a request.

        Allowed are, besides `origins`, the request's host, this machine's names and the loopback addresses, with any port.

        Args:
            values: the values of the Origin header.
            host: the request's host.

        Returns:
            The origin to allow in the reply; None if the request has none.

        Raises:
            RequestError: the origin is not allowed.
        """
        if not values:
            return None
        origin = normalize_origin(values[0]) if len(values) == 1 else None
        match = ORIGIN.fullmatch(origin or "")
        name = parse_host(match["authority"]) if match else None
        is_own = name is not None and (name in (self.hosts | LOOPBACK) - {ANY} or name == host)
        if origin is None or not (is_own or self.origins & {origin, ANY}):
            page = ", ".join(values)
            raise RequestError(f"the page at {page!r} may not use this server: --allow-origin permits it", status=403)
        return values[0]

    def check_authorization(self, values: Sequence[str]) -> None:
        """Raise RequestError for a wrong or missing key in the Authorization header; the comparison takes constant time."""
        if self.key is None:
            return
        scheme, _, sent = values[0].partition(" ") if values else ("", "", "")
        digests = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in (self.key, sent.strip(" "))]
        if scheme.lower() != "bearer" or not hmac.compare_digest(*digests):
            what = "the API key is wrong" if values else "an API key is needed"
            raise RequestError(f"{what}: send the header 'Authorization: Bearer KEY'", status=401, code="invalid_api_key")


def with_access_checks(app: Any, access: Access, log: Callable[[str], object]) -> Any:
    """Wrap an ASGI application in these checks; replies to allowed origins get the CORS headers.

    Args:
        app: the application.
        access: the checks.
        log: called with a line for each refused request.
    """
    from starlette.responses import JSONResponse, Response

    async def checked_app(scope: Any, receive: Any, send: Any) -> None:
        def header(name: bytes) -> list[str]:
            return [value.decode("latin-1") for key, value in scope["headers"] if key == name]

        origin = None
        try:
            host = access.check_host(header(b"host"))
            origin = access.check_origin(header(b"origin"), host)
            requested_method = header(b"access-control-request-method")
            if scope["method"] == "OPTIONS" and origin is not None and requested_method:
                private_network = header(b"access-control-request-private-network")
                headers = _preflight_headers(header(b"access-control-request-headers"), private_network)
                await Response(status_code=204, headers=headers)(scope, receive, _with_origin(origin, send))
                return
            # Load balancers, which have no key, request /health.
            if scope["path"] != "/health":
                access.check_authorization(header(b"authorization"))
        except RequestError as error:
            client = scope["client"][0] if scope["client"] else "?"
            log(f"{client} {one_line(scope['method'] + ' ' + scope['path'])}: status {error.status}, {one_line(str(error))}")
            challenge = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
            await JSONResponse(error.body(), error.status, challenge)(scope, receive, _with_origin(origin, send))
            return
        await app(scope, receive, _with_origin(origin, send))

    return checked_app


def _preflight_headers(requested: Sequence[str], private_network: Sequence[str]) -> dict[str, str]:
    """Return the headers of the reply to a CORS preflight request, which allow all valid header names that it requests."""
    names = [name.strip() for name in ",".join(requested).split(",")]
    valid = [name for name in names if re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", name)]
    return {
        "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, OPTIONS",
        "Access-Control-Allow-Headers": ", ".join(valid) or "authorization, content-type",
        "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
        **({"Access-Control-Allow-Private-Network": "true"} if private_network else {}),
    }


def _with_origin(origin: str | None, send: Any) -> Any:
    """Return ASGI's `send`, wrapped to add the headers that make a browser let the page read the reply."""
    if origin is None:
        return send

    async def send_with_origin(message: Any) -> None:
        if message["type"] == "http.response.start":
            cors = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
            message = {**message, "headers": [*message.get("headers", []), *cors]}
        await send(message)

    return send_with_origin
