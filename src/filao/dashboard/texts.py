"""What the pages say, in each language, read from the `.toml` files beside this one."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from filao.languages import Language, read_texts

FOLDER = Path(__file__).parent


@cache
def texts(language: Language) -> Mapping[str, str]:
    """Return what the pages say, by key."""
    return read_texts(FOLDER / f"texts.{language}.toml", language)
