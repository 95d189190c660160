"""The base of every model: a config and weights, saved and loaded as config.json + model.safetensors."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import reprlib
import threading
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from vlmkernels._files import write_atomic, write_text
from vlmkernels.models.parts.weight_files import WEIGHTS_FILE, Source, read_json, read_state_dict

CONFIG_FILE = "config.json"
Config = TypeVar("Config")
Model = TypeVar("Model", bound="Pretrained")
KINDS = {
    int: "an integer below 2**31",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
# Metadata of config fields added later: files without them have their defaults.
LATER = {"later": True}


class Pretrained(nn.Module):
    """A module with a frozen dataclass `config` that can be saved to, and built from, a folder.

    A subclass sets `model_type` (written to config.json and checked on loading) and `config_class`. If the
    format of its weights has changed, config.json contains the entries of `format`; files without them are of
    the first format, which `upgrade` converts.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[type]
    format: ClassVar[dict[str, Any]] = {}
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            wanted, got = self.config_class.__name__, type(config).__name__
            raise ValueError(f"config of {type(self).__name__} must be a {wanted}, got {got}")
        self.config = config

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors to `folder`, each under a temporary name, then renamed."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_tensors(tensors, path / WEIGHTS_FILE, {"format": "pt"})
        fields = {"model_type": self.model_type, **self.format, **dataclasses.asdict(self.config)}
        write_text(path / CONFIG_FILE, json.dumps(fields, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls: type[Model], folder: str | os.PathLike[str], *, device: torch.device | str = "cpu"
    ) -> Model:
        """The model that `save_pretrained` wrote to `folder`, in evaluation mode.

        Raises FileNotFoundError when a file is missing; ValueError when config.json belongs to another model
        or has unknown, missing or invalid fields, or when the weights do not match it (every such key is
        listed).
        """
        path = Path(folder) / CONFIG_FILE
        fields = read_json(path)
        model_type = fields.pop("model_type", None)
        if model_type != cls.model_type:
            raise ValueError(
                f"{path}: model_type must be {cls.model_type!r} for {cls.__name__}, got {model_type!r}"
            )
        given = {name: fields.pop(name) for name in cls.format if name in fields}
        if given and given != cls.format:
            raise ValueError(
                f"{path}: the format of the weights must be {cls.format} for {cls.__name__}, got {given}"
            )
        with naming(path):
            config: Any = config_from_dict(cls.config_class, fields, complete=True)
        state_dict = read_state_dict(folder)
        with naming(folder):
            model = cls.with_weights(config, state_dict)
        return model.to(device)

    @classmethod
    def with_weights(cls: type[Model], config: Any, state_dict: Mapping[str, Tensor]) -> Model:
        """A model of `config` with these weights, in evaluation mode; ValueError if they do not match it.

        They are compared before memory is allocated, so that no config can request more than the weights
        need.
        """
        _without_memory(lambda: cls(config), 1000 + 4 * len(state_dict)).check_weights(state_dict)
        model = cls(config)
        model.load_weights(state_dict)
        return model.eval()

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies `state_dict` in, after `check_weights`."""
        self.check_weights(state_dict)
        self.load_state_dict(self.upgrade(state_dict))

    def upgrade(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of any version of the format as those of the last."""
        return dict(state_dict)

    def check_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """ValueError listing every missing and unknown key and those of another shape or dtype."""
        own, state_dict = self.state_dict(), self.upgrade(state_dict)
        shared = {name: tensor for name, tensor in state_dict.items() if name in own}
        lists = {
            "missing": [name for name in own if name not in state_dict],
            "unknown": [name for name in state_dict if name not in own],
            "of another shape": [
                f"{name} must be {list(own[name].shape)} by the config, got {list(tensor.shape)}"
                for name, tensor in shared.items()
                if own[name].shape != tensor.shape
            ],
            "not floating": [
                f"{name} is {tensor.dtype}"
                for name, tensor in shared.items()
                if own[name].is_floating_point() and not tensor.is_floating_point()
            ],
        }
        faults = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in lists.items() if names]
        if faults:
            raise ValueError(f"state_dict does not match {type(self).__name__}: " + "; ".join(faults))


def below(config: Any, least: int, *names: str) -> list[str]:
    """An error for each of these integers of a config, or tuples of them, below `least`; None is valid."""
    return [
        f"{name} must be at least {least}, got {value}"
        for name in names
        if (value := getattr(config, name)) is not None
        and (min(value, default=least) if isinstance(value, tuple) else value) < least
    ]


@contextlib.contextmanager
def naming(source: Source) -> Iterator[None]:
    """Prefixes the message of a ValueError with the file or folder that it is about."""
    try:
        yield
    except ValueError as error:
        if isinstance(source, Mapping):
            raise
        raise ValueError(f"{os.fspath(source)}: {error}") from error


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of `folder`/config.json, `model_type` included. FileNotFoundError, ValueError."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; pass a folder such as RUN/final")
    return read_json(path)


def config_from_dict(
    config_class: type[Config], fields: Mapping[str, Any], *, complete: bool = False
) -> Config:
    """`config_class(**fields)`, nested dataclasses and tuples restored; ValueError listing bad fields.

    With `complete`, fields that have a default are required as well, except the `LATER` ones.
    """
    hints = typing.get_type_hints(config_class)
    known = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    unknown = sorted(set(fields) - set(known))
    required = [
        name
        for name, field in known.items()
        if (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)
        or (complete and field.metadata != LATER)
    ]
    missing = sorted(set(required) - set(fields))
    if unknown or missing:
        raise ValueError(f"{config_class.__name__}: unknown fields {unknown}, missing fields {missing}")
    values = {}
    faults = []
    for name, value in fields.items():
        nested = [kind for kind in _options(hints[name]) if dataclasses.is_dataclass(kind)]
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, dict) and nested:
            value = config_from_dict(_with_fields(nested, value), value, complete=complete)
        if not _is_of(value, hints[name]):
            wanted = " or ".join(KINDS.get(kind) or str(kind) for kind in _options(hints[name]))
            faults.append(f"{name} must be {wanted}, got {reprlib.repr(value):.200}")
        values[name] = value
    if faults:
        raise ValueError(f"{config_class.__name__}: " + "; ".join(faults))
    return config_class(**values)


def _with_fields(classes: Sequence[Any], fields: Mapping[str, Any]) -> Any:
    """The dataclass that has most of these fields, of equals the first."""
    return max(classes, key=lambda each: sum(field.name in fields for field in dataclasses.fields(each)))


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value from JSON, lists made tuples, is of an annotated type."""
    if isinstance(hint, types.UnionType):
        return any(_is_of(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if isinstance(value, tuple) and kinds[-1] is ...:
            kinds = kinds[:1] * len(value)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_of, value, kinds))
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, hint) and (hint is not int or abs(value) < 2**31)


def _without_memory(build: Callable[[], Model], most: int) -> Model:
    """`build()` with parameters on the meta device; ValueError beyond `most` parameters."""
    thread, count = threading.get_ident(), itertools.count(1)

    def limit_parameters(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if threading.get_ident() == thread and next(count) > most:
            raise ValueError(
                f"the config requires more than {most} parameters, far more than there are weights"
            )

    handle = register_module_parameter_registration_hook(limit_parameters)
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError as error:
        raise ValueError(f"the config requires sizes that no tensor can have: {error}") from error
    finally:
        handle.remove()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file, written atomically."""
    try:
        write_atomic(path, lambda partial: save_file(dict(tensors), partial, dict(metadata)))
    except SafetensorError as error:  # raised by save_file for an OSError, such as that of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
