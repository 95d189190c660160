"""The settings and inputs of a run that must be the same when it is resumed; checkpoints contain them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from vlmkernels.data import ImageTransform
from vlmkernels.models.parts.pretrained import config_from_dict

from . import kinds
from .checkpoint import file_digest
from .config import FREE_ON_RESUME, TrainConfig

RunIdentity = dict[str, Any]


def settings_identity(kind: kinds.Kind, config: TrainConfig) -> RunIdentity:
    """The kind of training and its settings that a resumed run may not change."""
    free = FREE_ON_RESUME - {"num_workers"} if config.streams else FREE_ON_RESUME
    fields = {name: value for name, value in kind.settings(config).items() if name not in free}
    return _plain({"kind": kind.name, **fields})


def with_later_fields(earlier: RunIdentity, model: Any) -> RunIdentity:
    """``earlier``, its transform and model configuration extended by the fields added since, at their
    defaults.
    """
    if earlier.get("transform"):
        earlier = {**earlier, **_plain({"transform": _with_defaults(earlier["transform"])})}
    stored, config = earlier.get("model configuration"), getattr(model, "config", None)
    if not stored or config is None:
        return earlier
    complete = dataclasses.asdict(config_from_dict(type(config), stored))
    return {**earlier, **_plain({"model configuration": complete})}


def _with_defaults(transform: dict[str, Any]) -> dict[str, Any]:
    """All fields of an image transform, or of several views; those of another class as they are."""
    if "transforms" in transform:
        return {"transforms": [_with_defaults(each) for each in transform["transforms"]]}
    known = ImageTransform().to_dict()
    return {**known, **transform} if transform.keys() <= known.keys() else transform


def inputs_identity(source: Any, tokenizer: Path, transform: Any, model: Any) -> RunIdentity:
    """What the settings refer to: the data, the tokenizer's files, the image transform, the model's sizes.

    A table is identified by its content, tars by their names and sizes. Images are not compared.
    """
    config = getattr(model, "config", None)
    identity: RunIdentity = {
        "tokenizer files": files_digest(f for f in tokenizer.iterdir() if f.is_file()),
        "transform": transform and transform.to_dict(),
        "model configuration": config and dataclasses.asdict(config),
    }
    if hasattr(source, "shards"):
        sizes = ((url, os.path.getsize(url) if os.path.isfile(url) else None) for url in source.shards)
        identity |= {"number of tars": len(source.shards), "tars": digest(sizes)}
    else:
        identity["number of samples"] = len(source)
        if hasattr(source, "path"):
            identity["content of the table"] = file_digest(source.path)
    return _plain(identity)


def reject_changes(run: Path, earlier: RunIdentity, here: RunIdentity) -> None:
    """ValueError listing the values of ``here`` that differ from ``earlier``, those of ``run``."""
    changed = [
        f"{name} was {_short(earlier[name])}, got {_short(value)}"
        for name, value in here.items()
        if name in earlier and earlier[name] != value
    ]
    if changed:
        raise ValueError(f"resume: settings or inputs differ from those of {run}: " + "; ".join(changed))


def _plain(identity: RunIdentity) -> RunIdentity:
    """As JSON stores it, so that it compares equal after it was written and read."""
    return json.loads(json.dumps(identity, default=str))


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of files, in any order."""
    return digest((file.name, file_digest(file)) for file in sorted(files))


def digest(facts: Iterable[Any]) -> str:
    return sha256(json.dumps(list(facts)).encode()).hexdigest()


def _short(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return f"sha256 {value[:12]}" if is_digest else repr(value)
