"""ViLD (Gu et al. 2022): a detector whose classes are texts, taught by a CLIP or ALIGN.

The variant "text" needs boxes alone. The others also need a file of proposals with the teacher's embeddings,
which `vlmkernels propose` makes with a detector that was trained before, of the variant "text" for example.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.data import BrokenImageError, Sample, load_pairs
from vlmkernels.data.pictures import Picture
from vlmkernels.data.proposals import Proposals
from vlmkernels.data.samples import sample_rng
from vlmkernels.models import vild
from vlmkernels.models.align import ALIGN
from vlmkernels.models.clip import CLIP, ClipConfig
from vlmkernels.models.detector import Detections
from vlmkernels.models.parts.pretrained import read_config
from vlmkernels.train import objective
from vlmkernels.train.config import TrainConfig, option
from vlmkernels.train.resume_check import files_digest
from vlmkernels.train.teacher import teacher_digest
from vlmkernels.use.bundle import inference, load_model, read_tokenizer, read_transform
from vlmkernels.use.detection_scores import DetectionScores, evaluate_detection

from ._kind import Kind, Options, Values

SCALES = (0.6, 1.4)
AUGMENT = ("scales", "flip")
TEACHERS = (CLIP.model_type, ALIGN.model_type)


@dataclasses.dataclass(frozen=True)
class VildOptions(Options):
    clip: str | None = option(
        None,
        "vild: folder of a trained CLIP, SigLIP or ALIGN (RUN/final), the teacher, which becomes part of the "
        "model",
    )
    proposals: str | None = option(None, "vild: file of vlmkernels propose; needed by all variants but text")
    prompt: str = option("{}", "vild: text of a class, {} being its name; several are separated by |")


class Jitter:
    """Large-scale jitter of a picture with its proposals, which are looked up by the key of the sample."""

    def __init__(self, side: int, scales: Sequence[float], flip: bool, proposals: str | None) -> None:
        self.side, self.scales, self.flip, self.file = side, (scales[0], scales[1]), flip, proposals
        self.proposals = None if proposals is None else Proposals(proposals)

    def __call__(self, picture: Picture, rng: random.Random, key: str) -> Picture:
        if self.proposals is not None:
            if key not in self.proposals:
                reason = f"{self.file} has none of {key}; these are other pictures (data_options)"
                raise BrokenImageError(f"proposals: {reason}", key=key)
            boxes, embeddings = self.proposals[key]
            picture = dataclasses.replace(picture, proposals=boxes, embeddings=embeddings)
        return picture.jittered(self.side, rng, scales=self.scales, flip=self.flip)

    def to_dict(self) -> dict[str, Any]:
        return {"image_size": self.side, "scales": list(self.scales), "flip": self.flip}


class Vild(Kind):
    """A model contains its teacher, whose tokenizer and transform are those of the run.

    `augment` has `scales`, the smallest and the largest of a picture against the model's side, and `flip`.
    """

    name = "vild"
    model = vild.ViLD
    configs = vild.CONFIGS
    options = VildOptions
    detects = True

    def faults(self, config: TrainConfig) -> list[str]:
        faults, options = super().faults(config), self.own_options(config)
        if config.init is None:
            if options.clip is None:
                faults.append(
                    "clip must be the folder of a trained CLIP, SigLIP or ALIGN (RUN/final), got None"
                )
            elif (found := read_config(options.clip).get("model_type")) not in TEACHERS:
                faults.append(f"clip: {options.clip} must be of type {' or '.join(TEACHERS)}, got {found}")
        elif options.clip is not None:
            faults.append(f"clip may not be given with init, which contains one, got {options.clip}")
        if faults:
            return faults
        given = read_config(config.init) if config.init is not None else None
        variant = given["variant"] if given is not None else self.sizes(config).variant
        if (options.proposals is None) != (variant == "text"):
            needed = "must not be given" if variant == "text" else "must be a file of vlmkernels propose"
            faults.append(f"proposals {needed} for the variant {variant}, got {options.proposals}")
        elif options.proposals is not None:
            width = given["embed_dim"] if given is not None else read_config(options.clip)["embed_dim"]
            if (wide := Proposals(options.proposals).width) != width:
                faults.append(f"proposals: {options.proposals} must have width {width}, got {wide}")
        if wrong := [prompt for prompt in options.prompt.split("|") if "{}" not in prompt]:
            faults.append(f"prompt must have a {{}} for the name, got {', '.join(map(repr, wrong))}")
        if unknown := sorted(set(config.augment) - set(AUGMENT)):
            faults.append(
                f"augment of {self.name} must have {' and '.join(AUGMENT)}, got {', '.join(unknown)}"
            )
        scales = config.augment.get("scales", SCALES)
        if not (isinstance(scales, (list, tuple)) and len(scales) == 2 and 0 < scales[0] <= scales[1]):
            faults.append(f"augment: scales must be two ascending positive numbers, got {scales}")
        return faults

    def build_transform(self, config: TrainConfig) -> Any:
        """The teacher's, of crops."""
        return read_transform(Path(self._teacher_folder(config)))

    def drawn_transform(self, config: TrainConfig, transform: Any) -> Jitter:
        if config.init is None:
            side = self.sizes(config).detector.max_size
        else:
            side = read_config(config.init)["detector"]["max_size"]
        scales, flip = config.augment.get("scales", SCALES), config.augment.get("flip", True)
        return Jitter(side, scales, bool(flip), self.own_options(config).proposals)

    def new_tokenizer(self, config: TrainConfig, source: Any) -> Any:
        return read_tokenizer(Path(self._teacher_folder(config)))

    def new_model(self, config: TrainConfig, tokenizer: Any) -> vild.ViLD:
        teacher: Any = load_model(self._teacher_folder(config), "cpu")[0]
        base = load_pairs(config.data, **config.data_options).base  # type: ignore[union-attr]
        sizes = dataclasses.replace(
            self.sizes(config), embed_dim=teacher.config.embed_dim, teacher=teacher.config, base=base
        )
        model = vild.ViLD(sizes)
        assert model.teacher is not None
        model.teacher.load_state_dict(teacher.state_dict())
        return model

    def own_inputs(self, config: TrainConfig) -> dict[str, Any]:
        options = self.own_options(config)
        found = {} if options.clip is None else {"files of the teacher": teacher_digest(Path(options.clip))}
        if options.proposals is not None:
            found["content of the proposals"] = files_digest([Path(options.proposals)])
        return found

    def build_task(self, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> Detection:
        return Detection(config, self.own_options(config), self._teacher_folder(config))

    def text_config(self, config: Any) -> Any:
        return config.teacher

    def image_side(self, config: Any) -> int | None:
        return config.teacher.image_size if isinstance(config.teacher, ClipConfig) else None

    def detector(self, model: Any, tokenizer: Any, templates: Sequence[str] | None = None) -> Any:
        """(image, categories) to `Detections`, by the teacher in the model."""
        return vild.ViLDDetector(
            model, text_encoder(model.teacher, tokenizer), templates=templates or ("{}",)
        )

    def propose(self, model: Any, transform: Any, picture: Picture, most: int) -> tuple[Tensor, Tensor]:
        """The best `most` proposals [P, 4] of a picture, and the teacher's embeddings of them [P, D]."""
        with inference(model) as device:
            boxes = model.detector.propose([picture.image.to(device)])[0][:most].cpu()
        return boxes, vild.crop_embeddings(image_encoder(model.teacher, transform), picture.to_pil(), boxes)

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
    ) -> DetectionScores:
        self.check_images(dataset)
        detector = self.detector(model, tokenizer, templates)

        def detect(image: Tensor) -> Detections:
            with inference(model):
                return detector(image, dataset.names)

        return evaluate_detection(detect, dataset)

    def _teacher_folder(self, config: TrainConfig) -> str:
        return config.init if config.init is not None else str(self.own_options(config).clip)


def text_encoder(teacher: Any, tokenizer: Any) -> Callable[[list[str]], Tensor]:
    def encode(texts: list[str]) -> Tensor:
        with inference(teacher) as device:
            return teacher.encode_text(tokenizer(texts).to(device)).float()

    return encode


def image_encoder(teacher: Any, transform: Any) -> Callable[[list[Any]], Tensor]:
    def encode(images: list[Any]) -> Tensor:
        with inference(teacher) as device:
            pixels = torch.stack([transform(image) for image in images]).to(device)
            return teacher.encode_image(pixels).float().cpu()

    return encode


class Detection:
    """The task: the losses of the detector, each a mean over the joint batch.

    The samples of anchors and regions of a picture depend on the seed, the step and its key.
    """

    scores = ("class_loss", "box_loss")

    def __init__(self, config: TrainConfig, options: VildOptions, teacher: str) -> None:
        self.seed, self.prompts, self.folder = config.seed, options.prompt.split("|"), teacher
        self.classes: vild.Classes | None = None

    def prepare(self, source: Any, device: torch.device) -> None:
        """The embeddings of the names of all classes."""
        model, tokenizer, _ = load_teacher(self.folder)
        embeddings = vild.text_embeddings(text_encoder(model, tokenizer), source.names, self.prompts)
        novel = torch.tensor([name in source.novel for name in source.names])
        self.classes = vild.Classes(embeddings.clone().to(device), novel.to(device))

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        pictures = [sample["image"] for sample in samples]
        return {
            "images": [picture.image for picture in pictures],
            "targets": [picture.target() for picture in pictures],
            "keys": [sample["key"] for sample in samples],
        }

    def loss(
        self, model: nn.Module, batch: dict[str, Any], step: int, measured: bool
    ) -> tuple[Tensor, Callable[[], Values]] | None:
        assert self.classes is not None, "prepare was called"
        classes, keys = self.classes, batch["keys"]
        device = classes.embeddings.device
        samples = objective.sum_over_processes(torch.tensor(len(keys), device=device))
        if not int(samples):
            return None
        images, targets = batch["images"], batch["targets"]
        if not keys:  # a process without samples takes part with a black image, which counts nothing
            images, targets = [torch.zeros(3, 32, 32)], [_nothing(classes)]
        generators = [
            torch.Generator().manual_seed(sample_rng(self.seed, "regions", step, key).getrandbits(63))
            for key in keys or ["none"]
        ]
        placed = [{name: value.to(device) for name, value in target.items()} for target in targets]
        out = model([image.to(device) for image in images], placed, classes, generators=generators)
        names = list(out["counts"])
        own = torch.tensor([out["counts"][name] if keys else 0 for name in names], device=device)
        total = objective.sum_over_processes(own)
        parts = torch.stack([out[f"{name}_loss"] for name in names])
        parts = parts * (own / total.clamp_min(1)).to(parts.dtype)

        def measure() -> Values:
            joint = objective.sum_over_processes(parts.detach().double()).tolist()
            named = {f"{name}_loss": value for name, value in zip(names, joint, strict=True)}
            return {"loss": sum(joint), "class_loss": 0.0, **named}

        return parts.sum() * objective.process_count(), measure

    def after_step(self, model: Any) -> None:
        pass


def _nothing(classes: vild.Classes) -> dict[str, Tensor]:
    boxes = torch.zeros(0, 4)
    return {
        "boxes": boxes,
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 32, 32, dtype=torch.bool),
        "proposals": boxes,
        "embeddings": torch.zeros(0, classes.embeddings.shape[1]),
    }


def load_teacher(folder: str) -> tuple[Any, Any, Any]:
    """The model of a folder, or the teacher in a trained ViLD; with tokenizer and transform."""
    kind = Vild()
    if read_config(folder).get("model_type") == vild.ViLD.model_type:
        model, tokenizer, transform = load_model(folder, "cpu", fitting=[kind])
        return model.teacher, tokenizer, transform
    return load_model(folder, "cpu")
