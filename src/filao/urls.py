"""How a URL is shown everywhere: without its password. And what a URL must be before any parser sees it.

A password may contain characters that end it for a parser, and a parser that fails quotes its input. So a URL is judged
here, a parser's message is never repeated, and all between the first colon and the last @ is taken for the password.
"""

import re
from urllib.parse import SplitResult, urlsplit

from filao.errors import ConfigurationError

SHOWN_MAX = 300  # characters of a URL that a text repeats
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BARE = re.compile(r"(//)?[^/:@]*:.*@", re.DOTALL)  # a URL whose scheme was forgotten or mistyped
_SETTING = re.compile(r"(pass\w*\s*=).*", re.IGNORECASE | re.DOTALL)  # in a query, or in libpq's other notation
_NO_PORT = re.compile(r":(?!\d{1,5}(?:[/?,:]|$)).*", re.DOTALL)
_ADDRESS = re.compile(r"\[[0-9A-Fa-f:.]*\]")


def has_scheme(url: str) -> bool:
    """Return whether a text is meant as a URL rather than as the path of a file."""
    return _SCHEME.match(url) is not None


def is_bare(url: str) -> bool:
    """Return whether a text looks like the URL of a server without its scheme, or like libpq's settings."""
    return _BARE.match(url) is not None or _SETTING.search(url) is not None


def shown_url(url: str) -> str:
    """Return a URL without its password, however malformed it is; the path of a file is returned as it stands."""
    url = _SETTING.sub(r"\1…", url)
    scheme = _SCHEME.match(url)
    if scheme is None:
        return _shortened(_masked(url) if _BARE.match(url) else url)
    rest = url[scheme.end() :]
    if rest.startswith("/"):  # no server: the path of a file
        return _shortened(url)
    return _shortened(scheme.group() + _masked(rest))


def _masked(rest: str) -> str:
    """Hide what may be a password: all between the first colon and the last @, or after a colon without a port."""
    user, at, place = rest.rpartition("@")
    if at:
        slashes = "//" if user.startswith("//") else ""
        name, colon, _ = user.removeprefix("//").partition(":")
        return f"{slashes}{name}{colon and ':…'}@{place}"
    address = _ADDRESS.match(rest)  # of IPv6, with colons of its own
    start = address.end() if address else 0
    return rest[:start] + _NO_PORT.sub(":…", rest[start:])


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}…"


def checked(url: str) -> SplitResult:
    """Return the parts of a server's URL, or raise `ConfigurationError` for one that parsers read in different ways."""
    parts = _parts(url)
    problem = "it has a bracket or a character that no host has, or a port that is no number up to 65535"
    if parts is not None:
        problem = _problem(parts)
        if not problem:
            return parts
    raise ConfigurationError(
        f"the URL {shown_url(url)} cannot be read: {problem}. In a user name or a password, write / as %2F, ? as %3F, "
        f"# as %23, @ as %40, : as %3A, [ as %5B, ] as %5D and % as %25"
    )


def _problem(parts: SplitResult) -> str:
    if "\0" in parts.geturl():
        return "it holds a NUL character"
    if parts.netloc.count("@") > 1 or "@" in parts.path or ("@" in parts.query and "@" not in parts.netloc):
        return "an @ stands where none can be"
    return "it has a #" if parts.fragment else ""


def hosts(parts: SplitResult) -> list[str]:
    """Return the hosts of a server's URL, with their ports."""
    return [host for host in parts.netloc.rpartition("@")[2].split(",") if host]


def _parts(url: str) -> SplitResult | None:
    """Return the parts, or None where the parser fails: its exception is dropped, because it may quote a password."""
    try:
        url.encode()  # half a surrogate pair is no text
        parts = urlsplit(url)
        for host in hosts(parts):
            _ = urlsplit(f"//{host}").port
    except ValueError:
        return None
    return parts
