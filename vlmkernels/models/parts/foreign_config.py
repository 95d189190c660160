"""Configs of other libraries: the values that are read, and all that a model here does not support."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any


class Part:
    """One object of such a config: its values, defaults filled in, and the errors in it.

    `read` has the keys that are used, with their defaults; a value is of the type of its default, or a list
    or null for the keys in `loose`. `fixed` has the keys of features that a model here does not support, with
    the one value that disables them (empty values are equal). Other keys are an error unless `ignored`; None
    ignores all.
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
            self.faults.append(f"{name} must be an object, got {given!r:.100}")
            given = {}
        self.values = {**read, **{key: given[key] for key in read if key in given}}
        for key, default in read.items():
            value = self.values[key]
            if not (_is_like(value, default) or (key in loose and type(value) in (list, type(None)))):
                self.fault(key, f"a value like {default!r}")
                self.values[key] = default
        for key, value in given.items():
            if key in fixed and (value or None) != (fixed[key] or None):
                self.faults.append(f"{name}: {key} must be {fixed[key]!r}, got {value!r:.100}")
            elif ignored is not None and not (key in read or key in fixed or key in ignored):
                self.faults.append(f"{name}: unknown key {key}")

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def fault(self, key: str, wanted: str) -> None:
        self.faults.append(f"{self.name}: {key} must be {wanted}, got {self.values[key]!r:.100}")

    def side(self, key: str) -> Any:
        """A length that may be given twice, for height and width; an error if they differ."""
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
