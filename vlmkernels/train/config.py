"""What a training run is made of: one flat dataclass, filled from YAML and overridden by flags."""

# ruff: noqa: RUF009 (_option only wraps dataclasses.field)

from __future__ import annotations

import contextlib
import dataclasses
import math
import reprlib
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vlmkernels._files import write_text

CAPTIONERS = ("lm", "flamingo", "simvlm")
OBJECTIVES = ("clip", "align", "siglip", *CAPTIONERS)
SHIPPED = "configs"
SEEDS = 2**31  # numpy takes 32 bits, and each process adds its number


def _option(default: Any, help: str) -> Any:
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class TrainConfig:
    """One training run. Every field is a key of the YAML file and a flag of ``vlmkernels train``.

    ``batch_size`` counts the pairs of one step over all processes together, so that a run on two processes
    is the run on one. ValueError lists every field that does not fit.
    """

    model: str = _option(
        "emoji-tiny", "name of a model configuration, as in vlmkernels.models.<kind>.CONFIGS"
    )
    model_options: dict[str, Any] = _option({}, "fields of the model configuration to replace")
    init: str | None = _option(
        None, "folder of a trained model (RUN/final) to start from, with its tokenizer and transform"
    )
    tokenizer: str | None = _option(
        None,
        "align: tokenizer.json or vocab.txt of word pieces; learned from the data's texts when not given",
    )
    vision: str | None = _option(
        None, "flamingo: folder of a trained CLIP (RUN/final), whose image tower it keeps frozen"
    )
    language_model: str | None = _option(
        None, "flamingo: folder of a trained language model (RUN/final of train lm), which it keeps frozen"
    )
    data: str = _option(
        "emoji3:style-train",
        "emoji3[:SPLIT], scenes[:SPLIT], a CSV/TSV file of filepath and title, or webdataset tars",
    )
    data_options: dict[str, Any] = _option(
        {}, "options of vlmkernels.data.load_pairs, such as {caption: label_tags}"
    )
    samples_per_epoch: int | None = _option(None, "tars: how many samples count as one epoch")
    augment: dict[str, Any] = _option(
        {},
        "options of image_transform in training: crop_scale, crop_ratio, flip, jitter; none: no augmentation",
    )
    out: str | None = _option(None, "run folder; runs/<kind>-<date>-<time> when not given")
    resume: str | None = _option(None, "'auto' (newest checkpoint in --out, if any) or a checkpoint folder")
    epochs: int = _option(10, "passes over the data")
    max_steps: int | None = _option(None, "stop after this many steps; the schedule still spans all epochs")
    batch_size: int = _option(256, "pairs per step, all processes together")
    images_per_row: int = _option(
        1, "lm, flamingo: pairs that follow each other in one row of tokens; the others see one at a time"
    )
    drop_last: bool = _option(False, "leave out the last, smaller batch of an epoch")
    optimizer: str = _option("adamw", "adamw or sgd (momentum 0.9)")
    lr: float = _option(1e-3, "peak learning rate")
    min_lr: float = _option(0.0, "learning rate at the end of the cosine")
    warmup_steps: int = _option(20, "steps of linear warm-up")
    weight_decay: float = _option(0.1, "decay of weight matrices; gains, biases and scales have none")
    beta1: float = _option(0.9, "AdamW's first decay rate")
    beta2: float = _option(0.98, "AdamW's second decay rate")
    eps: float = _option(1e-6, "AdamW's epsilon")
    grad_clip: float = _option(1.0, "largest norm of the gradient; 0 turns clipping off")
    label_smoothing: float | None = _option(
        None, "of the softmax losses; clip 0 and align 0.1 when not given"
    )
    ema_decay: float = _option(0.0, "decay of an average of the weights, which is then saved; 0 turns it off")
    precision: str = _option("fp32", "fp32, bf16 or fp16 (fp16 needs a CUDA device); weights stay fp32")
    device: str = _option("auto", "auto or cpu")
    seed: int = _option(0, "seed of weights, order and augmentation")
    deterministic: bool = _option(True, "use deterministic algorithms of torch")
    num_workers: int = _option(0, "processes that load images, per training process")
    log_every: int = _option(1, "steps between lines of metrics.jsonl; each waits for the device")
    save_every: int = _option(0, "steps between checkpoints; 0 saves after each epoch")
    keep: int = _option(2, "number of checkpoints to keep")
    tensorboard: bool = _option(True, "write TensorBoard events")
    progress: bool = _option(True, "show a progress bar")

    def __post_init__(self) -> None:
        faults: list[str] = []
        hints = field_types()
        for field in dataclasses.fields(self):
            try:
                setattr(self, field.name, _convert(getattr(self, field.name), hints[field.name]))
            except ValueError as error:
                faults.append(f"{field.name} {error}")
        if not faults:
            faults = self._range_faults()
        if faults:
            raise ValueError("training configuration: " + "; ".join(faults))

    def _range_faults(self) -> list[str]:
        numbers = {name: value for name, value in self.to_dict().items() if isinstance(value, float)}
        faults = [f"{name} must be finite, got {v}" for name, v in numbers.items() if not math.isfinite(v)]
        for name in ("epochs", "batch_size", "images_per_row", "log_every", "keep"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "min_lr",
            "warmup_steps",
            "weight_decay",
            "grad_clip",
            "num_workers",
            "save_every",
            "seed",
        ):
            if getattr(self, name) < 0:
                faults.append(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= SEEDS:
            faults.append(f"seed must be below {SEEDS}, got {self.seed}")
        for name in ("beta1", "beta2", "ema_decay", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and (value < 0 or value >= 1):
                faults.append(f"{name} must be in [0, 1), got {value}")
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                faults.append(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_steps", "samples_per_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{name} must be at least 1, got {value}")
        if "allow_pipe" in self.data_options:  # who starts the run allows that, not who wrote the file
            faults.append("data_options must not hold allow_pipe, an argument of its own (--allow-pipe)")
        if self.streams and self.samples_per_epoch is None:
            faults.append(f"samples_per_epoch must be given for the tars {self.data!r}")
        choices = {
            "optimizer": ("adamw", "sgd"),
            "precision": ("fp32", "bf16", "fp16"),
            "device": ("auto", "cpu"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                faults.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        return faults

    @property
    def streams(self) -> bool:
        """Whether the data are tars, which have no numbered samples."""
        return ".tar" in self.data

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# Fields that a resumed run may change: none of them alters the losses or the weights.
FREE_ON_RESUME = frozenset(
    {"out", "resume", "num_workers", "save_every", "keep", "tensorboard", "progress", "max_steps"}
)


def field_types() -> dict[str, Any]:
    """The annotated type of each field of TrainConfig."""
    return typing.get_type_hints(TrainConfig)


def _convert(value: Any, hint: Any) -> Any:
    """Bring a YAML or flag value to a field's type; YAML reads ``1e-3`` as text and ``1`` as an integer."""
    options = () if typing.get_origin(hint) is dict else typing.get_args(hint)
    if type(None) in options:
        if value is None:
            return None
        (hint,) = (option for option in options if option is not type(None))
    if typing.get_origin(hint) is dict:
        parsed = value
        if isinstance(value, str):
            with contextlib.suppress(yaml.YAMLError):
                parsed = yaml.safe_load(value)
        if isinstance(parsed, Mapping):
            return dict(parsed)
        raise ValueError(f"must be a mapping such as {{name: value}}, got {reprlib.repr(value):.200}")
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    names = {bool: "true or false", str: "text", int: "an integer", float: "a number"}
    raise ValueError(f"must be {names[hint]}, got {reprlib.repr(value):.200}")


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package, such as ``clip-emoji``."""
    folder = resources.files(__package__) / SHIPPED
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_config(source: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, or of a shipped configuration named without folder and ending.

    FileNotFoundError names the shipped configurations; ValueError says what is wrong with the file.
    """
    path = Path(source)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif str(source).removesuffix(".yaml") in shipped_configs():
        entry = resources.files(__package__) / SHIPPED / (str(source).removesuffix(".yaml") + ".yaml")
        text = entry.read_text(encoding="utf-8")
    else:
        raise FileNotFoundError(
            f"config: no file {source!s}; the configurations that come with vlmkernels are "
            + ", ".join(shipped_configs())
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"config: {source!s} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(f"config: {source!s} must hold keys and values, got {type(values).__name__}")
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ValueError(
            f"config: {source!s} has unknown keys {', '.join(unknown)}; "
            f"known keys are {', '.join(sorted(known))}"
        )
    return values


def write_config(path: Path, config: TrainConfig) -> None:
    """Write ``config`` as YAML, whole or not at all."""
    write_text(path, yaml.safe_dump(config.to_dict(), sort_keys=False))
