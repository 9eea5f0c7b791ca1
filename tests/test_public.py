"""The public API changes only on purpose."""

from tests.public_api import LISTING, listing


def test_the_public_api_is_the_one_that_is_listed() -> None:
    assert LISTING.read_text(encoding="utf-8") == listing(), "on purpose? python -m tests.public_api, and the changelog"
