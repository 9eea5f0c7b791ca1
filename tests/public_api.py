"""The public API as a listing, one name to a line: `python -m tests.public_api` writes it anew."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = (
    "filao",
    "filao.sync",
    "filao.engine",
    "filao.moving",
    "filao.conformance",
    "filao.testing",
    "filao.contrib.django",
    "filao.dashboard",
)
LISTING = Path(__file__).with_name("public_api.txt")


def listing() -> str:
    """Return every public name with its parameters; types are left out, which interpreters write differently."""
    return "".join(f"{line}\n" for module in MODULES for line in _names(module))


def _names(name: str) -> Iterator[str]:
    module = import_module(name)
    public = getattr(module, "__all__", None) or [
        key for key, value in vars(module).items() if not key.startswith("_") and _is_own(value, name)
    ]
    for key in sorted(public):
        yield from _described(f"{name}.{key}", getattr(module, key))


def _is_own(value: Any, module: str) -> bool:
    return (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module


def _described(path: str, value: Any) -> Iterator[str]:
    if not inspect.isclass(value):
        yield path + (_parameters(value) if inspect.isroutine(value) else "")
        return
    yield path
    own = {name for kind in value.__mro__ if kind.__module__.startswith("filao") for name in vars(kind)}
    own |= {*getattr(value, "__dataclass_fields__", {})}
    for name in sorted(own):
        if not name.startswith("_"):
            member = inspect.getattr_static(value, name, None)
            yield f"{path}.{name}" + (_parameters(getattr(value, name)) if inspect.isroutine(member) else "")


def _parameters(function: Any) -> str:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "(…)"
    plain = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    return str(inspect.Signature([one.replace(default=...) if one.default is not one.empty else one for one in plain]))


if __name__ == "__main__":
    LISTING.write_text(listing(), encoding="utf-8")
