"""A frozen model that teaches: its features of each batch, or kept on disk where every epoch has the same."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vlmkernels import __version__
from vlmkernels._files import stamp
from vlmkernels._optional import cache_folder
from vlmkernels.data import Collate
from vlmkernels.data.samples import stack_images
from vlmkernels.use.bundle import load_model

from .checkpoint import file_digest
from .feature_store import FORMAT, FeatureStore, Table, find_or_make
from .resume_check import digest, files_digest

log = logging.getLogger("vlmkernels.train")
ROWS = 256  # samples that are encoded at once for the disk


class Teacher:
    """A trained model in evaluation mode and without gradients, with its own tokenizer and transform.

    It encodes every batch, unless :meth:`prepare` found or computed its features of the whole data.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        model, self.tokenizer, self.transform = load_model(folder, "cpu")
        self.model: Any = model.requires_grad_(False)
        self.store: FeatureStore | None = None
        self.place: Path | None = None  # where it is kept

    def prepare(self, source: Any, device: torch.device, settings: dict[str, Any], num_workers: int) -> None:
        """Read the features of ``source``, a data set with numbered samples, from the disk, or compute them.

        ``settings`` are all that determine its texts. Texts that are drawn at random are kept as they are in
        epoch 0; others are encoded when they occur.
        """
        identity = digest(
            [
                ["format", FORMAT],
                ["version", __version__],
                ["teacher", teacher_digest(self.folder)],
                ["device", device.type],
                ["settings", {name: str(value) for name, value in settings.items()}],
                ["samples", len(source)],
                ["files", _file_facts(source)],
            ]
        )

        def compute() -> FeatureStore:
            log.info("the teacher encodes %d samples", len(source))
            return self._encode(source, device, num_workers)

        try:
            self.place = cache_folder() / "teachers" / f"{identity[:32]}.safetensors"
        except OSError as error:
            log.warning("the teacher's features are not kept: %s", error)
        self.store = compute() if self.place is None else find_or_make(self.place, identity, compute)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Normalised image_features and text_features [B, E] of a ``TeacherCollate``'s batch; logit_scale."""
        tokens = batch["teacher_tokens"]
        self.model.to(tokens.device)
        if self.store is None:
            return self.model(batch.get("teacher_images", batch["images"]), tokens)
        images, unknown = self.store.images.find(batch["keys"])
        if unknown:
            raise ValueError(
                f"teacher: {batch['keys'][unknown[0]]} could not be read when the teacher encoded the data; "
                f"remove {self.place} and resume the run"
            )
        texts, unknown = self.store.texts.find(batch["texts"])
        texts = texts.to(tokens.device)
        if unknown:
            texts[unknown] = self.model.encode_text(tokens[unknown], normalize=True).to(texts.dtype)
        scale = self.store.scale.to(tokens.device)
        return {"image_features": images.to(tokens.device), "text_features": texts, "logit_scale": scale}

    @torch.no_grad()
    def _encode(self, source: Any, device: torch.device, num_workers: int) -> FeatureStore:
        """The features of all readable samples in epoch 0."""
        source = copy.copy(source)  # it shares the record of skipped samples
        source.transform = self.transform
        source.set_epoch(0)
        loader = DataLoader(
            source,
            batch_size=ROWS,
            collate_fn=Collate(self.tokenizer, self.transform.image_size),
            num_workers=num_workers,
            generator=torch.Generator(),  # the global one is that of the student's dropout
        )
        self.model.to(device)
        images: dict[str, Tensor] = {}
        texts: dict[str, Tensor] = {}
        scale = None
        for batch in loader:
            if batch["keys"]:
                output = self.model(batch["images"].to(device), batch["tokens"].to(device))
                images.update(zip(batch["keys"], output["image_features"].float().cpu(), strict=True))
                texts.update(zip(batch["texts"], output["text_features"].float().cpu(), strict=True))
                scale = output["logit_scale"].float().cpu()
        if scale is None:
            raise ValueError(f"data: no sample can be read, {len(source.skipped)} were skipped")
        return FeatureStore(Table.of(images), Table.of(texts), scale)


class TeacherCollate:
    """The student's batch with teacher_tokens, and with teacher_images if the images are pairs of views.

    ``image_size``: of the teacher's view, None if it sees the student's images or none.
    """

    def __init__(self, student: Collate, tokenizer: Any, image_size: Any = None) -> None:
        self.student, self.tokenizer, self.image_size = student, tokenizer, image_size

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        if self.image_size is None:
            batch = self.student(samples)
        else:
            views: Any = [[{**s, "image": s["image"][view]} for s in samples] for view in range(2)]
            own, theirs = views
            batch = {**self.student(own), "teacher_images": stack_images(theirs, self.image_size)}
        return {**batch, "teacher_tokens": self.tokenizer(batch["texts"])}


def teacher_digest(folder: Path) -> str:
    """SHA-256 of a trained model's files: configuration, weights, tokenizer, transform."""
    return files_digest(file for suffix in ("json", "safetensors") for file in folder.glob(f"*.{suffix}"))


def _file_facts(source: Any) -> list[Any]:
    """Of a table: its content, and path, size and time of the last change of its images."""
    if not hasattr(source, "image_files"):
        return []
    return [file_digest(source.path), *map(stamp, source.image_files())]
