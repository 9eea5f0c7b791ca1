"""Show griffe, which reads the sources and runs nothing, the methods of the blocking twin: those that are derived from
the async ones, and the docstrings that those that are written out get from them. `make docs` uses it.
"""

from typing import Any

import griffe

TWINS = {"Broker": "broker.Broker", "Message": "message.Message", "Transaction": "message.Transaction"}


class Derived(griffe.Extension):
    """Puts what a method of `filao.sync` is derived from in its place."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Look at the package once it has been read."""
        if pkg.name != "filao":
            return
        for name, twin in TWINS.items():
            ours, theirs = pkg[f"sync.{name}"], pkg[twin]
            for member in list(ours.members.values()):
                origin = theirs.members.get(member.name)
                if isinstance(origin, griffe.Function) and isinstance(member, griffe.Attribute):
                    ours.set_member(member.name, _derived(member, origin))
                elif origin is not None and member.docstring is None:
                    member.docstring = origin.docstring


def _derived(member: griffe.Attribute, origin: griffe.Function) -> griffe.Function:
    method = griffe.Function(
        member.name,
        parameters=origin.parameters,
        returns=origin.returns,
        lineno=member.lineno,
        endlineno=member.endlineno,
        docstring=origin.docstring,
    )
    method.overloads = origin.overloads
    return method
