"""Who may use our pages: what the sandbox's door and the dashboard's have in common.

A request is refused if its `Host` or `Origin` is another site's, or if the browser says that another site caused it. So
no page on the web can reach our server through its visitor's browser, and none can show ours in a frame. A token is
compared in constant time, and guesses of one address wait for each other.
"""

import asyncio
import hmac
import ipaddress
from collections.abc import Collection, Mapping
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
GUESS_COSTS = 0.5  # seconds that a wrong token costs; guesses of one address wait for each other
GUESSES_MAX = 16  # guesses of one address that may wait at a time
ADDRESSES_MAX = 1_024  # addresses whose guesses may wait at a time: as many as a process usually has descriptors

SAFE = {
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""The headers of every answer; each door adds its `content-security-policy`."""


def is_of_host(headers: Headers, hosts: Collection[str]) -> bool:
    """Return whether a request was sent to one of these names, whatever the port."""
    try:
        return (urlsplit(f"//{headers.get('host', '')}").hostname or "") in hosts
    except ValueError:
        return False


def odd_host(hosts: Collection[str]) -> str | None:
    """Return the first of these that is no host's name alone, as requests have it; None: there is none.

    With a scheme or a port it equals no name that a request is compared with, and browsers send names in ASCII.
    """
    return next((host for host in hosts if not _is_name(host)), None)


def _is_name(host: str) -> bool:
    try:
        if ":" in host:
            return bool(ipaddress.IPv6Address(host))
        return host.isascii() and urlsplit(f"//{host}").hostname == host.lower()
    except ValueError:
        return False


def is_of_other_site(headers: Headers, *, is_visit: bool) -> bool:
    """Return whether a page of another site caused a request; `is_visit`: following a link to a page is allowed."""
    origin = headers.get("origin")
    if origin is not None and _netloc(origin) != headers.get("host"):
        return True
    is_visit = is_visit and headers.get("sec-fetch-mode", "navigate") == "navigate"
    return headers.get("sec-fetch-site", "none") in ("cross-site", "same-site") and not is_visit


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def cookie_of(headers: Headers, name: str) -> str:
    """Return the value of a cookie; empty when there is none.

    All ports of a host share its cookies. Those of other programs may break the standard's grammar, and `http.cookies`
    would stop reading at them.
    """
    for header in headers.getlist("cookie"):
        for cookie in header.split(";"):
            called, _, value = cookie.partition("=")
            if called.strip() == name:
                return value.strip()
    return ""


def safely(send: Send, safe: Mapping[str, str]) -> Send:
    """Return a send that adds these headers to every answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in safe.items():
                headers[name] = value
        await send(message)

    return sending


class TooOftenError(Exception):
    """As many guesses from one address wait as may."""

    def __init__(self) -> None:
        super().__init__("Too many guesses at a time. Try again in a few seconds.\n")


class _Line:
    """The guesses of one address."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.waiting = 0


class Guesses:
    """Compares tokens, for each address one after the other; a wrong one delays the next, but no other address's."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._lines: dict[str, _Line] = {}
        """Of the addresses that wait."""

    async def is_right(self, client: str, given: str) -> bool:
        """Return whether this is the token, in a time that does not show how much of it is right.

        Raises `TooOftenError` when too many of the client's address, or of other addresses, wait already.
        """
        address = _address(client)
        if address not in self._lines and len(self._lines) >= ADDRESSES_MAX:
            raise TooOftenError
        line = self._lines.setdefault(address, _Line())
        if line.waiting >= GUESSES_MAX:
            raise TooOftenError
        line.waiting += 1
        try:
            async with line.turn:
                if hmac.compare_digest(given.encode(errors="replace"), self._token):
                    return True
                await asyncio.sleep(GUESS_COSTS)
                return False
        finally:
            line.waiting -= 1
            if not line.waiting:
                del self._lines[address]


def client_of(scope: Scope) -> str:
    """Return the host of the one who asks; empty where a request comes through a Unix socket."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def prefix_of(scope: Scope) -> str:
    """Return where an application is mounted, as addresses and the path of a cookie write it."""
    return quote(scope.get("root_path", ""))


def path_of(scope: Scope) -> str:
    """Return the path of a request within its application."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _address(client: str) -> str:
    """Return what one client has to itself: an IPv4 address, or an IPv6 network of 64 bits."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv4Address):
        return client
    return str(address.ipv4_mapped or ipaddress.IPv6Network((int(address), 64), strict=False))
