"""A kind of training: its options, its model, tokenizer and transform, its task, its evaluation."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from vlmkernels.data import ClipTokenizer, ImageTransform, WordPieceTokenizer, image_transform
from vlmkernels.models.parts.pretrained import Pretrained, config_from_dict, read_config
from vlmkernels.train import kinds
from vlmkernels.train.config import TrainConfig, settings_of
from vlmkernels.use.bundle import load_bundle, read_tokenizer, read_transform
from vlmkernels.use.scores import Scores

Values = dict[str, float]
HALF = (0.5, 0.5, 0.5)
# Ids that follow the others of a vocabulary, and their places from its end.
IDS_AT_THE_END = {"eot_id": 1, "eos_id": 1, "end_id": 1, "bos_id": 2, "start_id": 2}


class Task(Protocol):
    """The part of a training step that depends on the kind.

    ``loss`` returns the loss of this process, whose gradient averaged over the processes is that of the joint
    batch, and a function that measures the joint batch; all processes call it, or none. It is None, on all
    processes, for a joint batch without samples; the part of one process may be empty.
    """

    @property
    def scores(self) -> tuple[str, ...]:
        """The measured values that a summary shows."""

    @property
    def collate(self) -> Callable[[Any], dict[str, Any]]:
        """Samples to a batch."""

    def loss(
        self, model: nn.Module, batch: dict[str, Any], step: int, measured: bool
    ) -> tuple[Tensor, Callable[[], Values]] | None: ...

    def prepare(self, source: Any, device: torch.device) -> None:
        """Called once before the first step, on all processes, with the data set."""

    def after_step(self, model: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of one kind only; here none. Fields are made by ``config.option``."""


class Kind(abc.ABC):
    """One kind of training. It has no state: the settings of a run are in the ``TrainConfig``."""

    name: ClassVar[str]
    model: ClassVar[type[Pretrained]]
    configs: ClassVar[Mapping[str, Any]]  # of the model, by name
    start: ClassVar[Mapping[str, Any]] = {}  # fields that all of them start with
    options: ClassVar[type] = Options
    label_smoothing: ClassVar[float | None] = None  # by default; None: no softmax over the batch
    sees_images: ClassVar[bool] = True
    embeds: ClassVar[bool] = False  # images and texts: `vlmkernels embed` and `search`
    captions: ClassVar[bool] = False  # images: `vlmkernels caption`
    has_features: ClassVar[bool] = False  # of images: `vlmkernels probe`
    detects: ClassVar[bool] = False  # objects of categories: `vlmkernels detect` and `propose`
    matches: ClassVar[bool] = False  # judges texts of an image: `vlmkernels match`

    def own_options(self, config: TrainConfig) -> Any:
        """The options of this kind in ``config``."""
        names = [field.name for field in dataclasses.fields(self.options)]
        return self.options(**{name: v for name, v in config.options.items() if name in names})

    def settings(self, config: TrainConfig) -> dict[str, Any]:
        """All settings of a run by name, the options of this kind among them."""
        common = {k: v for k, v in config.to_dict().items() if k not in config.options}
        return {**common, **dataclasses.asdict(self.own_options(config))}

    def faults(self, config: TrainConfig) -> list[str]:
        """Why ``config`` does not describe a model of this kind."""
        faults = []
        if config.init is not None:
            fields = read_config(config.init)
            if not self.trains(fields):
                faults.append(
                    f"init: {config.init} must contain a model for {self.name}, "
                    f"got one for {kinds.name_of(fields)}"
                )
        own = dataclasses.asdict(self.own_options(config))
        for name, value in config.options.items():
            if name not in own:
                owners = [kind.name for kind in kinds.every() if name in settings_of(kind.options)]
                faults.append(f"{name} may only be given for {' and '.join(owners)}, got {value}")
        return faults

    def sizes(self, config: TrainConfig) -> Any:
        """The named model configuration with ``model_options`` applied. ValueError lists the known ones."""
        if config.model not in self.configs:
            raise ValueError(
                f"model: {self.name} has no configuration {config.model!r}; it has {', '.join(self.configs)}"
            )
        base = self.configs[config.model]
        options: dict[str, Any] = {**self.start, **config.model_options}
        fields = [field.name for field in dataclasses.fields(base)]
        unknown = sorted(str(name) for name in options if name not in fields)
        if unknown:
            raise ValueError(
                f"model_options: unknown fields {', '.join(unknown)}; known are {', '.join(fields)}"
            )
        for name, place in IDS_AT_THE_END.items():  # in a vocabulary of another size
            if name in fields and isinstance(options.get("vocab_size"), int):
                options.setdefault(name, options["vocab_size"] - place)
        return config_from_dict(type(base), {**{name: getattr(base, name) for name in fields}, **options})

    def check_images(self, dataset: Any) -> None:
        """ValueError for data without what this kind needs: images, or images with boxes."""
        if self.detects != hasattr(dataset, "picture"):
            needs = "images with boxes (composites, COCO's JSON)" if self.detects else "images with texts"
            raise ValueError(f"data: {self.name} needs {needs}, got {dataset!r}")
        if self.sees_images and not getattr(dataset, "has_images", True):
            raise ValueError(f"data: {self.name} needs images, which {dataset!r} does not have")

    def build_transform(self, config: TrainConfig) -> ImageTransform | None:
        """The inference transform of ``config.init``, or a new one; None for a kind without images."""
        if not self.sees_images:
            return None
        return self.new_transform(config) if config.init is None else read_transform(Path(config.init))

    def new_transform(self, config: TrainConfig) -> ImageTransform:
        """Pixels to [-1, 1], resized to the model's images."""
        return image_transform(self.sizes(config).image_size, HALF, HALF, interpolation="bilinear")

    def drawn_transform(self, config: TrainConfig, transform: ImageTransform | None) -> Any:
        """The transform of the training images: ``transform`` with the run's augmentation, if any."""
        if transform is None or not config.augment:
            return transform
        return ImageTransform.from_dict({**transform.to_dict(), "train": True, **config.augment})

    def build_tokenizer(self, config: TrainConfig, source: Any) -> ClipTokenizer | WordPieceTokenizer:
        """The tokenizer of ``config.init``, or a new one, which may be learned from the data ``source``."""
        return (
            self.new_tokenizer(config, source) if config.init is None else read_tokenizer(Path(config.init))
        )

    @abc.abstractmethod
    def new_tokenizer(self, config: TrainConfig, source: Any) -> ClipTokenizer | WordPieceTokenizer: ...

    def build_model(self, config: TrainConfig, tokenizer: Any) -> Pretrained:
        """The model of ``config.init``, or a new one for the tokenizer's ids."""
        return self.new_model(config, tokenizer) if config.init is None else load_bundle(config.init).model

    def new_model(self, config: TrainConfig, tokenizer: Any) -> Pretrained:
        return self.model(dataclasses.replace(self.sizes(config), **self.token_ids(tokenizer)))

    def trained_module(self, config: TrainConfig, model: Pretrained) -> nn.Module:
        """What is trained and saved in checkpoints: the model, or a module with more that contains it."""
        return model

    def trained_model(self, module: Any) -> Pretrained:
        """The model in what :meth:`trained_module` returned."""
        return module

    def parameter_groups(self, config: TrainConfig, module: nn.Module) -> list[dict] | None:
        """Groups for the optimizer, each with its weight decay and, if its learning rate differs from that of
        the run, the factor ``lr_scale``; None: those of the module, or matrices with decay and the rest
        without.
        """
        return None

    def own_inputs(self, config: TrainConfig) -> dict[str, Any]:
        """What the options of this kind refer to and a resumed run may not change, as values of JSON."""
        return {}

    def token_ids(self, tokenizer: Any) -> dict[str, int]:
        """Fields of the model's configuration that the tokenizer determines."""
        return {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id}

    @abc.abstractmethod
    def build_task(self, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> Task:
        """The task of a run, with images of ``image_size``: an int, (H, W), or None for no images."""

    def trains(self, fields: Mapping[str, Any]) -> bool:
        """Whether this kind of training gives models with these fields of config.json."""
        return fields.get("model_type") == self.model.model_type

    def text_config(self, config: Any) -> Any:
        """The part of a model's configuration with vocab_size and context_length."""
        return config

    def image_side(self, config: Any) -> int | None:
        """Side of the images that a model of this configuration takes; None: any."""
        return config.image_size

    def image_features(self, model: Any, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, F]
        """What a probe sees of the images, for a kind that ``has_features``: here their embeddings."""
        return model.encode_image(images)

    @abc.abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,
        transform: Any,
        dataset: Any,
        *,
        batch_size: int,
        templates: Any = None,
        num_beams: int = 1,
    ) -> Scores:
        """What `vlmkernels eval` shows of a trained model; a kind ignores options that it lacks."""
