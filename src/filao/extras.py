"""Extras: libraries that Filao needs only for a part of it, and what to install when one of them is missing."""

from types import TracebackType

from filao.errors import ConfigurationError


class ExtraMissing(ConfigurationError, ImportError):
    """What was imported needs a library that is not there; an ImportError too, for programs that can do without it."""


class Extra:
    """`with Extra("filao[dashboard]", of="filao.dashboard"):` says what to install if an import inside it fails.

    Inside it stand only imports of the extra's own libraries, so that the error of no other module is taken for theirs.
    """

    def __init__(self, install: str, *, of: str) -> None:
        self._install = install
        self._of = of

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, ImportError):
            raise ExtraMissing(
                f"{self._of} needs what cannot be imported here: pip install '{self._install}' ({error})"
            ) from error
