"""Configs of other libraries: what is read of them, and every reason why a model here is none of theirs."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any


class Part:
    """One object of such a config: its values, defaults filled in, and what is wrong with it.

    `read` has the keys that are taken, with what they are when absent; a value is of the type of its default,
    or a list or null for the keys in `loose`. `fixed` has the keys that name what a model here cannot have,
    with the one value that leaves it out (all that is empty is the same). Other keys are a fault unless
    `ignored`, which is all of them when None.
    """

    def __init__(
        self,
        name: str,
        given: Any,
        read: Mapping[str, Any],
        fixed: Mapping[str, Any],
        ignored: Container[str] | None = None,
        loose: Container[str] = (),
    ) -> None:
        self.name = name
        self.faults: list[str] = []
        if not isinstance(given, Mapping):
            self.faults.append(f"{name} is {given!r:.100}, wants an object")
            given = {}
        self.values = {**read, **{key: given[key] for key in read if key in given}}
        for key, default in read.items():
            value = self.values[key]
            if not (_is_like(value, default) or (key in loose and type(value) in (list, type(None)))):
                self.fault(key, f"a value like {default!r}")
                self.values[key] = default
        for key, value in given.items():
            if key in fixed and (value or None) != (fixed[key] or None):
                self.faults.append(f"{name}: {key} is {value!r:.100}, which this model does not have")
            elif ignored is not None and not (key in read or key in fixed or key in ignored):
                self.faults.append(f"{name}: {key} is not known")

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def fault(self, key: str, wanted: str) -> None:
        self.faults.append(f"{self.name}: {key} is {self.values[key]!r:.100}, wants {wanted}")

    def side(self, key: str) -> Any:
        """A length that may be given twice, for height and width; a fault where these differ."""
        value = self.values[key]
        if type(value) is list:
            if len(value) == 2 and value[0] == value[1]:
                return value[0]
            self.fault(key, "one number")
        return value


def _is_like(value: Any, default: Any) -> bool:
    if default is None:
        return True
    if type(value) is int and abs(value) >= 2**31:
        return False
    return type(value) is type(default) or (type(default) is float and type(value) is int)
