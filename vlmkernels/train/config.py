"""The settings of a training run, from YAML, overridden by flags."""

# ruff: noqa: RUF009 (option only wraps dataclasses.field)

from __future__ import annotations

import contextlib
import dataclasses
import math
import reprlib
import typing
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vlmkernels._files import write_text

from . import kinds

SHIPPED = "configs"
YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError)  # deep nesting, integers of many digits
SEEDS = 2**31  # numpy allows 32 bits, and each process adds its number


class _Loader(yaml.SafeLoader):
    """Refuses an alias within what it names: values of a file are trees."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        return super().construct_object(node, deep=True)


def option(default: Any, help: str, *, least: int | None = None) -> Any:
    """A field that is a key of the YAML file and a flag of ``vlmkernels train``.

    ``least`` is its smallest value.
    """
    more: dict[str, Any] = {"default": default}
    if isinstance(default, dict):
        more = {"default_factory": lambda: dict(default)}
    return dataclasses.field(**more, metadata={"help": help, "least": least})


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field made by :func:`option`, with its type."""

    name: str
    hint: Any
    default: Any
    help: str
    least: int | None


@cache
def settings_of(holder: type) -> dict[str, Setting]:
    """The settings of a dataclass by name."""
    hints = typing.get_type_hints(holder)
    return {
        field.name: Setting(
            field.name,
            hints[field.name],
            {} if field.default is dataclasses.MISSING else field.default,
            **field.metadata,
        )
        for field in dataclasses.fields(holder)
        if field.metadata
    }


def settings() -> dict[str, Setting]:
    """Every key of a YAML file and flag: those of all runs, and the options of each kind."""
    own = [settings_of(kind.options) for kind in kinds.every()]
    return {name: each for group in (settings_of(TrainConfig), *own) for name, each in group.items()}


@dataclasses.dataclass(init=False)
class TrainConfig:
    """One training run. Every field is a key of the YAML file and a flag of ``vlmkernels train``.

    So are the options of the kinds (``vlmkernels.train.kinds``), which are given in the same way, as in
    ``TrainConfig(epochs=3, images_per_row=2)``; ``options`` contains those that are not the default.
    ``batch_size`` counts the pairs of one step over all processes, so that a run on two processes equals the
    run on one. ValueError lists every invalid setting.
    """

    model: str = option("emoji-tiny", "name of a model configuration, as in vlmkernels.models.<kind>.CONFIGS")
    model_options: dict[str, Any] = option({}, "fields of the model configuration to replace")
    init: str | None = option(
        None, "folder of a trained model (RUN/final) to start from, with its tokenizer and transform"
    )
    data: str = option(
        "emoji3:style-train",
        "emoji3[:SPLIT], scenes[:SPLIT], a CSV/TSV file of filepath and title, or webdataset tars; for kinds "
        "without images also lines:FILE, a caption a line; for detectors composites[:SPLIT] or COCO's JSON",
    )
    data_options: dict[str, Any] = option(
        {}, "options of vlmkernels.data.load_pairs, such as {caption: label_tags}"
    )
    samples_per_epoch: int | None = option(None, "tars: how many samples count as one epoch", least=1)
    augment: dict[str, Any] = option(
        {},
        "options of image_transform in training: crop_scale, crop_ratio, flip, caption_flip, jitter, hue, "
        "grayscale; none: no augmentation",
    )
    out: str | None = option(None, "run folder; runs/<kind>-<date>-<time> when not given")
    resume: str | None = option(None, "'auto' (newest checkpoint in --out, if any) or a checkpoint folder")
    epochs: int = option(10, "passes over the data", least=1)
    max_steps: int | None = option(
        None, "stop after this many steps; the schedule still spans all epochs", least=1
    )
    batch_size: int = option(256, "pairs per step, all processes together", least=1)
    drop_last: bool = option(False, "drop the last, incomplete batch of an epoch")
    optimizer: str = option("adamw", "adamw or sgd (momentum 0.9)")
    lr: float = option(1e-3, "peak learning rate")
    min_lr: float = option(0.0, "learning rate at the end of the cosine")
    warmup_steps: int = option(20, "steps of linear warm-up")
    weight_decay: float = option(0.1, "decay of weight matrices; gains, biases and scales have none")
    beta1: float = option(0.9, "AdamW's first decay rate")
    beta2: float = option(0.98, "AdamW's second decay rate")
    eps: float = option(1e-6, "AdamW's epsilon")
    lookahead_steps: int = option(
        0, "Lookahead: updates between those of the slow weights, which are saved as final/; 0 disables it"
    )
    lookahead_alpha: float = option(0.5, "Lookahead: how far the slow weights move towards the fast ones")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 disables clipping")
    label_smoothing: float | None = option(None, "of the softmax losses; clip 0 and align 0.1 when not given")
    ema_decay: float = option(
        0.0, "decay of the exponential moving average of the weights, which is saved as final/; 0 disables it"
    )
    precision: str = option("fp32", "fp32, bf16 or fp16 (fp16 needs a CUDA device); weights stay fp32")
    device: str = option("auto", "auto or cpu")
    seed: int = option(0, "seed of weights, order and augmentation")
    deterministic: bool = option(True, "use deterministic algorithms of torch")
    num_workers: int = option(0, "processes that load images, per training process")
    log_every: int = option(1, "steps between lines of metrics.jsonl; each waits for the device", least=1)
    save_every: int = option(0, "steps between checkpoints; 0 saves after each epoch")
    keep: int = option(2, "number of checkpoints to keep", least=1)
    tensorboard: bool = option(True, "write TensorBoard events")
    progress: bool = option(True, "show a progress bar")

    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        values = {**values.pop("options", {}), **values}
        known, own = settings(), settings_of(TrainConfig)
        if unknown := sorted(values.keys() - known.keys()):
            raise TypeError(f"TrainConfig has no settings {', '.join(unknown)}")
        faults, self.options = [], {}
        for name, setting in known.items():
            try:
                value = _convert(values.get(name, setting.default), setting.hint)
            except ValueError as error:
                faults.append(f"{name} {error}")
                continue
            if name in own:
                setattr(self, name, value)
            elif value != setting.default:
                self.options[name] = value
        faults = faults or self._range_faults(known)
        if faults:
            raise ValueError("training configuration: " + "; ".join(faults))

    def _range_faults(self, known: Mapping[str, Setting]) -> list[str]:
        values = self.to_dict()
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        faults = [f"{name} must be finite, got {v}" for name, v in numbers.items() if not math.isfinite(v)]
        for name, value in values.items():
            least = known[name].least
            if least is not None and value is not None and value < least:
                faults.append(f"{name} must be at least {least}, got {value}")
        for name in (
            "min_lr",
            "warmup_steps",
            "weight_decay",
            "grad_clip",
            "num_workers",
            "save_every",
            "seed",
            "lookahead_steps",
        ):
            if getattr(self, name) < 0:
                faults.append(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= SEEDS:
            faults.append(f"seed must be below {SEEDS}, got {self.seed}")
        for name in ("beta1", "beta2", "ema_decay", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and (value < 0 or value >= 1):
                faults.append(f"{name} must be in [0, 1), got {value}")
        if not 0 < self.lookahead_alpha <= 1:
            faults.append(f"lookahead_alpha must be in (0, 1], got {self.lookahead_alpha}")
        if self.lookahead_steps and self.ema_decay:
            faults.append(
                f"lookahead_steps must be 0 with ema_decay, another average, got {self.lookahead_steps}"
            )
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                faults.append(f"{name} must be positive, got {getattr(self, name)}")
        if "allow_pipe" in self.data_options:  # allowed by the user of the run, not by the author of the file
            faults.append(
                "data_options must not contain allow_pipe, which is a separate argument (--allow-pipe)"
            )
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
        return ".tar" in self.data and not self.data.startswith("lines:")

    def to_dict(self) -> dict[str, Any]:
        """All settings by name; of the options of the kinds those that are not the default."""
        values = dataclasses.asdict(self)
        return values.pop("options") | values


# Fields that a resumed run may change: none of them alters the losses or the weights.
FREE_ON_RESUME = frozenset(
    {"out", "resume", "num_workers", "save_every", "keep", "tensorboard", "progress", "max_steps"}
)


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
            with contextlib.suppress(*YAML_ERRORS):
                parsed = yaml.load(value, _Loader)
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
    """The keys and values of a YAML file, or of a shipped configuration named without folder and extension.

    FileNotFoundError lists the shipped configurations; ValueError says what is wrong with the file.
    """
    path = Path(source)
    if path.is_file():
        text = path.read_bytes()
    elif str(source).removesuffix(".yaml") in shipped_configs():
        entry = resources.files(__package__) / SHIPPED / (str(source).removesuffix(".yaml") + ".yaml")
        text = entry.read_bytes()
    else:
        raise FileNotFoundError(
            f"config: no file {source!s}; the configurations that come with vlmkernels are "
            + ", ".join(shipped_configs())
        )
    try:
        values = yaml.load(text, _Loader)
    except YAML_ERRORS as error:
        raise ValueError(f"config: {source!s} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(
            f"config: {source!s} must be a mapping of keys to values, got {type(values).__name__}"
        )
    known = settings().keys()
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ValueError(
            f"config: {source!s} has unknown keys {', '.join(unknown)}; "
            f"known keys are {', '.join(sorted(known))}"
        )
    return values


def write_config(path: Path, values: Mapping[str, Any]) -> None:
    """Write settings as YAML, atomically."""
    write_text(path, yaml.safe_dump(dict(values), sort_keys=False))
