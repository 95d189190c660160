"""What decides the course of a run: kept in its checkpoints, and the same where one of them is resumed."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from vlmkernels.models.parts.pretrained import config_from_dict

from . import kinds
from .checkpoint import file_digest
from .config import FREE_ON_RESUME, TrainConfig

Course = dict[str, Any]


def of_settings(kind: kinds.Kind, config: TrainConfig) -> Course:
    """The kind of training and its settings that a resumed run may not change."""
    free = FREE_ON_RESUME - {"num_workers"} if config.streams else FREE_ON_RESUME
    fields = {name: value for name, value in kind.settings(config).items() if name not in free}
    return _plain({"kind": kind.name, **fields})


def with_later_fields(earlier: Course, model: Any) -> Course:
    """A run's course, its model configuration with the fields that came later, at their defaults."""
    stored, config = earlier.get("model configuration"), getattr(model, "config", None)
    if not stored or config is None:
        return earlier
    complete = dataclasses.asdict(config_from_dict(type(config), stored))
    return {**earlier, **_plain({"model configuration": complete})}


def of_inputs(source: Any, tokenizer: Path, transform: Any, model: Any) -> Course:
    """What the settings name: the data, the tokenizer's folder, the image transform, the model's sizes.

    A table is known by its content, tars by their names and sizes. Images are not looked at.
    """
    config = getattr(model, "config", None)
    course: Course = {
        "tokenizer files": _digest(
            (f.name, file_digest(f)) for f in sorted(tokenizer.iterdir()) if f.is_file()
        ),
        "transform": transform and transform.to_dict(),
        "model configuration": config and dataclasses.asdict(config),
    }
    if hasattr(source, "shards"):
        sizes = ((url, os.path.getsize(url) if os.path.isfile(url) else None) for url in source.shards)
        course |= {"number of tars": len(source.shards), "tars": _digest(sizes)}
    else:
        course["number of samples"] = len(source)
        if hasattr(source, "path"):
            course["content of the table"] = file_digest(source.path)
    return _plain(course)


def refuse_other(run: Path, earlier: Course, here: Course) -> None:
    """ValueError listing what of ``here`` differs from the run's ``earlier`` course."""
    changed = [
        f"{name} was {_short(earlier[name])}, got {_short(value)}"
        for name, value in here.items()
        if name in earlier and earlier[name] != value
    ]
    if changed:
        raise ValueError(f"resume: the course differs from that of {run}: " + "; ".join(changed))


def _plain(course: Course) -> Course:
    """Made of what JSON has, so that it is the same after it was written and read."""
    return json.loads(json.dumps(course, default=str))


def _digest(facts: Iterable[Any]) -> str:
    return sha256(json.dumps(list(facts)).encode()).hexdigest()


def _short(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return f"sha256 {value[:12]}" if is_digest else repr(value)
