"""What every model shares: a config and weights, saved and loaded as config.json + model.safetensors."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
Config = TypeVar("Config")
Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """A module with a frozen dataclass `config` that can be saved to, and built from, a folder.

    A subclass sets `model_type` (written to config.json and checked on loading) and `config_class`.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[type]
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            wanted, got = self.config_class.__name__, type(config).__name__
            raise ValueError(f"config: {type(self).__name__} wants a {wanted}, got {got}")
        self.config = config

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors to `folder`, each under a temporary name, then renamed."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomic(path / WEIGHTS_FILE, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
        fields = {"model_type": self.model_type, **dataclasses.asdict(self.config)}
        text = json.dumps(fields, indent=2) + "\n"
        write_atomic(path / CONFIG_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(
        cls: type[Model], folder: str | os.PathLike[str], *, device: torch.device | str = "cpu"
    ) -> Model:
        """The model that `save_pretrained` wrote to `folder`, in evaluation mode.

        Raises FileNotFoundError when a file is missing; ValueError when config.json belongs to another model
        or has unknown or missing fields, or when the weights do not fit it (every such key is listed).
        """
        fields = read_config(folder)
        model_type = fields.pop("model_type", None)
        if model_type != cls.model_type:
            path = Path(folder) / CONFIG_FILE
            raise ValueError(f"{path}: model_type is {model_type!r}, {cls.__name__} wants {cls.model_type!r}")
        model = cls(config_from_dict(cls.config_class, fields))
        model.load_weights(read_state_dict(Path(folder) / WEIGHTS_FILE))
        return model.to(device).eval()

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies `state_dict` in; ValueError listing every missing, unknown and mis-shaped key."""
        own = self.state_dict()
        missing = [name for name in own if name not in state_dict]
        unknown = [name for name in state_dict if name not in own]
        shapes = [
            f"{name} is {list(tensor.shape)}, the config wants {list(own[name].shape)}"
            for name, tensor in state_dict.items()
            if name in own and own[name].shape != tensor.shape
        ]
        faults = [
            f"{len(names)} {kind}: {', '.join(names)}"
            for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
            if names
        ]
        if faults:
            raise ValueError(f"state_dict does not fit {type(self).__name__}: " + "; ".join(faults))
        self.load_state_dict(dict(state_dict))


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of `folder`/config.json, `model_type` included."""
    fields = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"{Path(folder) / CONFIG_FILE}: wants a JSON object, got {type(fields).__name__}")
    return fields


def config_from_dict(config_class: type[Config], fields: Mapping[str, Any]) -> Config:
    """`config_class(**fields)`, nested dataclasses and tuples restored; ValueError listing bad fields."""
    hints = typing.get_type_hints(config_class)
    known = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    unknown = sorted(set(fields) - set(known))
    required = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = sorted(set(required) - set(fields))
    if unknown or missing:
        raise ValueError(f"{config_class.__name__}: unknown fields {unknown}, missing fields {missing}")
    values = {}
    for name, value in fields.items():
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, dict) and dataclasses.is_dataclass(hints[name]):
            value = config_from_dict(typing.cast(type, hints[name]), value)
        values[name] = value
    return config_class(**values)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary name beside `path` and renames the result to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:  # what save_file makes of an OSError
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_state_dict(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a state dict or of a file with one.

    Files: .safetensors; torch.save's format, read with weights_only=True; a TorchScript archive (OpenAI's
    CLIP). A training checkpoint with the weights under "state_dict" or "model_state_dict" is unwrapped, and
    DDP's prefix "module." removed. Raises FileNotFoundError, or ValueError when the file holds no state dict.
    """
    content: Any = source
    if not isinstance(source, Mapping):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of weights")
        if path.suffix == ".safetensors":
            content = load_file(path)
        elif _is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", DeprecationWarning
                )  # torch.jit's; OpenAI publishes in this format
                content = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        what = "the mapping given" if isinstance(source, Mapping) else str(source)
        raise ValueError(f"{what} is not a state dict: wants names mapped to tensors")
    prefix = "module." if content and all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
