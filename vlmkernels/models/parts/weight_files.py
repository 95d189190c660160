"""The files of models, JSON and weights, read as data: no code in them is run, and errors name the file."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmkernels.models.parts import torchscript

Source = Mapping[str, Any] | str | os.PathLike[str]

WEIGHTS_FILE = "model.safetensors"
INDEX = ".index.json"
# The weight files of transformers: one file, or an index of several.
WEIGHTS_FILES = (
    WEIGHTS_FILE,
    WEIGHTS_FILE + INDEX,
    "pytorch_model.bin",
    "pytorch_model.bin" + INDEX,
)
LFS_POINTER = b"version https://git-lfs.github.com/"
CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
WRAPPERS = ("module.", "model.")  # of data-parallel and averaged models; of Lightning's
INNER_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
MOST_CONTAINERS = 8  # nested; a checkpoint may contain itself
MEMORY_PER_BYTE = 4  # tied weights are stored once


def read_json(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file. FileNotFoundError; ValueError for anything but a JSON object."""
    path = Path(file)
    check_content(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply for the JSON of a model") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download or write it again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must contain a JSON object, got {type(fields).__name__}")
    return fields


def weights_file(folder: str | os.PathLike[str], names: Sequence[str] = WEIGHTS_FILES) -> Path:
    """The first of `names` that is in the folder; FileNotFoundError listing them."""
    for name in names:
        if (path := Path(folder) / name).is_file():
            return path
    raise FileNotFoundError(f"{folder} must contain one of {', '.join(names)}, found no weights")


def read_state_dict(source: Source) -> dict[str, Tensor]:
    """The tensors of a state dict or of a file with one.

    Files: .safetensors; torch.save's format, read with weights_only=True; a TorchScript archive (OpenAI's
    CLIP), of which the tensors are read and no code is run; the `.index.json` of several files. A folder
    stands for the first of `WEIGHTS_FILES` in it. A training checkpoint with the weights under one of
    `CONTAINERS` is unwrapped. Prefixes of data-parallel, compiled, averaged and Lightning modules are
    removed, in any order and number. Raises FileNotFoundError, or ValueError when the file contains no
    state dict.
    """
    if isinstance(source, Mapping):
        return _unwrapped(source, "the mapping given")
    path = Path(source)
    if path.is_dir():
        path = weights_file(path)
    return _read_shards(path) if path.name.endswith(INDEX) else _read_file(path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f'{index} must contain "weight_map", a mapping of tensor names to file names')
    files = sorted(set(shards.values()))
    outside = [name for name in files if name != Path(name).name or name in ("", ".", "..")]
    if outside:
        raise ValueError(f"{index} must name files in its own folder, got {', '.join(outside)}")
    content: dict[str, Tensor] = {}
    for name in files:
        part = _read_file(index.parent / name)
        if twice := sorted(content.keys() & part.keys()):
            raise ValueError(f"{index}: several of its files contain {', '.join(twice)}")
        content |= part
    if missing := sorted(name for name in _without_wrappers(shards, str(index)) if name not in content):
        raise ValueError(
            f"{index}: its files do not contain {', '.join(missing)}; a file belongs to another model"
        )
    return content


def _read_file(path: Path) -> dict[str, Tensor]:
    check_content(path)
    try:
        content = _load(path)
    except Exception as error:  # damaged files raise many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if found := re.search(r"GLOBAL (\S+)", reason) if isinstance(error, pickle.UnpicklingError) else None:
            raise ValueError(
                f"{path} contains {found.group(1)}, but only tensors are read, since unpickling anything "
                "else could run code; if you trust it, load it with torch and save its state dict as "
                ".safetensors"
            ) from error
        cause = (
            "not the pickle of a state dict" if isinstance(error, pickle.UnpicklingError) else reason[:150]
        )
        raise ValueError(f"{path}: damaged, or not a file of weights ({cause}); download it again") from error
    tensors = _unwrapped(content, str(path))
    special = [name for name, tensor in tensors.items() if not _is_loadable(tensor)]
    if special:
        raise ValueError(
            f"{path} must contain dense tensors that are not quantized, got {', '.join(special)}"
        )
    size, whole = path.stat().st_size, sum(each.numel() * each.element_size() for each in tensors.values())
    if whole > MEMORY_PER_BYTE * size:
        raise ValueError(f"{path}: its tensors repeat each other, {whole} bytes of {size} in the file")
    return tensors


def check_content(path: Path) -> None:
    """FileNotFoundError, or ValueError for an empty file or a git-lfs pointer."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
    if not start:
        raise ValueError(f"{path}: empty; download it again")
    if start == LFS_POINTER:
        raise ValueError(f"{path}: a git-lfs pointer instead of the file; download it with `git lfs pull`")


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if torchscript.is_archive([member.filename for member in members]):
            return torchscript.read(path)
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("compressed, which torch.save never does")
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_loadable(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized


def _unwrapped(content: Any, where: str) -> dict[str, Tensor]:
    """The state dict inside of checkpoints and wrappers."""
    for _ in range(MOST_CONTAINERS):
        if not isinstance(content, Mapping):
            break
        inside = [name for name in CONTAINERS if isinstance(content.get(name), Mapping)]
        if len(inside) > 1:
            raise ValueError(f"{where} contains {' and '.join(inside)}; pass one of these state dicts")
        if not inside:
            break
        content = content[inside[0]]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{where} must be a state dict, a mapping of names to tensors")
    return _without_wrappers(content, where)


def _without_wrappers(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same under the names in the model itself, without AveragedModel's count, "n_averaged"."""
    named = {INNER_WRAPPERS.sub("", name): value for name, value in content.items()}
    if len(named) < len(content):
        raise ValueError(f"{where} contains a tensor both with and without the prefix of a wrapper")
    while rest := {name: value for name, value in named.items() if name != "n_averaged"}:
        prefix = next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in rest)), None)
        if prefix is None:
            break
        named = {name.removeprefix(prefix): value for name, value in rest.items()}
    return named
