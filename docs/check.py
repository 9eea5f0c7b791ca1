"""Look at a built site: every link in it leads somewhere, nothing of it is fetched from elsewhere, and the blocking
twin's page has every method that the async one has. `make docs` runs it.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

FETCHED = {"script", "link", "img", "iframe", "source"}  # what a browser fetches without being asked


class Page(HTMLParser):
    """What one page links to, what it fetches, and where one can jump to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        self.anchors |= {name for name in (said.get("id"), said.get("name")) if name}
        target = said.get("href") or said.get("src")
        if target:
            (self.fetched if tag in FETCHED and said.get("rel") != "canonical" else self.links).append(target)


def faults(site: Path) -> list[str]:
    """Return what is wrong with the site, in sentences."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    found: list[str] = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        found += [f"{name} fetches {target}" for target in page.fetched if re.match(r"(https?:)?//", target)]
        for link in [*page.links, *page.fetched]:
            target, anchor = urldefrag(link)
            if re.match(r"[a-z]+:|//", target):
                continue
            there = (path.parent / unquote(target)).resolve() if target else path
            if not there.exists():
                found.append(f"{name} links to {link}, which is not there")
            elif anchor and there in pages and unquote(anchor) not in pages[there].anchors | {"__top"}:
                found.append(f"{name} links to {link}, and that page has no such place")
    return found + [fault for language in (site, site / "fr") for fault in missing(language / "reference", pages)]


def missing(reference: Path, pages: dict[Path, Page]) -> list[str]:
    """Return which methods of the async API the page of its blocking twin does not show."""
    api, sync = (pages[(reference / name).resolve()].anchors for name in ("api.html", "sync.html"))
    names = {
        match[1]
        for match in (re.fullmatch(r"filao\.((?:Broker|Message|Transaction)\.\w+)", one) for one in api)
        if match
    }
    return [f"{reference}/sync.html does not show {name}" for name in sorted(names) if f"filao.sync.{name}" not in sync]


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    print("\n".join(wrong) or f"{sys.argv[1]}: every link leads somewhere, and nothing is fetched from elsewhere.")
    sys.exit(bool(wrong))
