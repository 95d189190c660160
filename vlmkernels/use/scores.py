"""What an evaluation gives, whatever the kind of model."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Scores:
    """The number of samples and, by key, the reason for each that was left out. ``str`` is for people."""

    samples: int
    skipped: dict[str, str]

    def counted(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{self.samples} samples{skipped}"

    def to_dict(self) -> dict[str, Any]:
        """All numbers by name, of what JSON has."""
        return dataclasses.asdict(self)
