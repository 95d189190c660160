"""The result of an evaluation, for every kind of model."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Scores:
    """The number of samples and, by key, the reason for each skipped one. ``str`` is a report."""

    samples: int
    skipped: dict[str, str]

    def counted(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{self.samples} samples{skipped}"

    def to_dict(self) -> dict[str, Any]:
        """All numbers by name, ready for JSON."""
        return dataclasses.asdict(self)
