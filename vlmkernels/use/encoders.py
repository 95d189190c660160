"""Encoders of images and of texts, each trained alone: one call for all that ASIF can be made of."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels._files import digest
from vlmkernels.data import WordPieceTokenizer, image_transform
from vlmkernels.models.parts import packaged
from vlmkernels.models.parts.weight_files import WEIGHTS_FILE

from .bundle import check_batch_size, inference, load_model, usable

LITE0, MINILM = "efficientnet-lite0", "all-minilm-l6-v2"
LITE0_SIDE, LITE0_BATCH = 224, 16  # a larger batch is slower on a CPU: its maps leave the cache
MINILM_TOKENS = 256  # as sentence-transformers truncates
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Items (images of PIL, or texts) -> float32 [N, D] on the CPU.

    `name` tells whose features these are, for anchors that are kept. `prepare` is called for each item,
    `encode` for a list of at most `batch_size` results of it.
    """

    name: str
    prepare: Callable[[Any], Any]
    encode: Callable[[list[Any]], Tensor]
    batch_size: int = BATCH

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)

    def __call__(self, items: Iterable[Any]) -> Tensor:  # [N, D]
        """ValueError without items."""
        parts = list(self.batches(map(self.prepare, items)))
        if not parts:
            raise ValueError(f"items for {self.name} must not be empty")
        return torch.cat(parts)

    def batches(self, prepared: Iterable[Any]) -> Iterator[Tensor]:
        """Features of the items, batch by batch."""
        prepared = iter(prepared)
        while batch := list(itertools.islice(prepared, self.batch_size)):
            yield self.encode(batch).float().cpu()


def image_encoder(
    source: Any = LITE0,
    *,
    processor: Callable[..., Any] | None = None,
    name: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
) -> Encoder:
    """The encoder of images of a model.

    source: "efficientnet-lite0" (of the extra `asif`: ImageNet-1k, [N, 1280]); the folder of a trained CLIP,
        SigLIP or ALIGN of this library; a model of transformers with its `processor`; or a
        SentenceTransformer that takes images. Of transformers' models it is `get_image_features` where there
        is one, else the pooled output, else the mean of the last hidden states.
    name: by default that of the source, for a folder with a digest of its weights. device: for a model that
        is loaded here; one that is given stays where it is.

    ValueError for another source; ModuleNotFoundError without the package of the weights.
    """
    if source == LITE0:
        network = packaged.efficientnet_lite0().to(usable(device))
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        side = image_transform(LITE0_SIDE, packaged.LITE0_MEAN, packaged.LITE0_STD)
        return Encoder(name or LITE0, side, _images_by(network, network), batch_size or LITE0_BATCH)
    if isinstance(source, (str, os.PathLike)):
        model, _, transform = _folder(source, LITE0, device)

        def embed(images: Tensor) -> Tensor:
            return model.encode_image(images)

        return Encoder(name or _of_folder(source), transform, _images_by(model, embed), batch_size or BATCH)
    if hasattr(source, "encode"):
        return Encoder(name or _class_name(source), _same, _sentences(source), batch_size or BATCH)
    if not isinstance(source, nn.Module) or processor is None:
        raise ValueError(
            f"source must be {LITE0}, a folder, a SentenceTransformer, or a model of transformers with its "
            f"processor, got {type(source).__name__} and {type(processor).__name__}"
        )

    def prepare(image: Any) -> Tensor:
        return processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def features(images: Tensor) -> Tensor:
        if get := getattr(source, "get_image_features", None):
            return _pooled(get(pixel_values=images))
        return _pooled(source(pixel_values=images))

    return Encoder(name or _class_name(source), prepare, _images_by(source, features), batch_size or BATCH)


def text_encoder(
    source: Any = MINILM,
    *,
    tokenizer: Callable[..., Any] | None = None,
    name: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
) -> Encoder:
    """The encoder of texts of a model.

    source: "all-minilm-l6-v2" (of the extra `asif`: [N, 384], normalised, as sentence-transformers computes
        it); the folder of a trained CLIP, SigLIP or ALIGN of this library; a model of transformers with its
        `tokenizer`; or a SentenceTransformer. Of transformers' models it is `get_text_features` where there
        is one, else the mean of the last hidden states over the tokens that are not padding.
    name, device, errors: as for `image_encoder`.
    """
    size = batch_size or BATCH
    if source == MINILM:
        network = packaged.minilm().to(usable(device))
        pieces = WordPieceTokenizer.from_file(packaged.minilm_folder() / "tokenizer.json", MINILM_TOKENS)

        def sentences(texts: list[str]) -> Tensor:
            longest = 2 + max(len(pieces.encode(text)) for text in texts)
            with inference(network) as place:
                tokens = pieces(texts, min(longest, MINILM_TOKENS)).to(place)
                mask = pieces.attention_mask(tokens)
                return nn.functional.normalize(_mean(network(tokens, mask), mask), dim=1)

        return Encoder(name or MINILM, _same, sentences, size)
    if isinstance(source, (str, os.PathLike)):
        model, own, _ = _folder(source, MINILM, device)

        def embed(texts: list[str]) -> Tensor:
            with inference(model) as place:
                return model.encode_text(own(texts).to(place))

        return Encoder(name or _of_folder(source), _same, embed, size)
    if hasattr(source, "encode"):
        return Encoder(name or _class_name(source), _same, _sentences(source), size)
    if not isinstance(source, nn.Module) or tokenizer is None:
        raise ValueError(
            f"source must be {MINILM}, a folder, a SentenceTransformer, or a model of transformers with its "
            f"tokenizer, got {type(source).__name__} and {type(tokenizer).__name__}"
        )
    limits = (
        getattr(tokenizer, "model_max_length", None),
        getattr(source.config, "max_position_embeddings", None),
    )
    longest = min((limit for limit in limits if limit), default=None)

    def encode(texts: list[str]) -> Tensor:
        with inference(source) as place:
            given = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            inputs = {key: value.to(place) for key, value in given.items()}
            if get := getattr(source, "get_text_features", None):
                return _pooled(get(**inputs))
            return _mean(source(**inputs).last_hidden_state, inputs["attention_mask"])

    return Encoder(name or _class_name(source), _same, encode, size)


def same_encoder(first: str, second: str) -> bool:
    """Whether two names are of one model: folders are compared by the digest of their weights."""
    return first.rpartition("#")[2] == second.rpartition("#")[2]


def source_of(name: str) -> str:
    """What a name was made of: a folder, or the name of packaged weights."""
    return name.rpartition("#")[0] or name


def _same(item: Any) -> Any:
    return item


def _images_by(network: nn.Module, features: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], Tensor]:
    def encode(images: list[Tensor]) -> Tensor:
        with inference(network) as place:
            return features(torch.stack(images).to(place, memory_format=torch.channels_last))

    return encode


def _folder(source: str | os.PathLike[str], packaged_name: str, device: str) -> tuple[Any, Any, Any]:
    if not Path(source).is_dir():
        raise FileNotFoundError(
            f"encoder must be {packaged_name} or a folder such as RUN/final, and {source} is neither"
        )
    return load_model(source, device)


def _of_folder(folder: str | os.PathLike[str]) -> str:
    return f"{os.path.realpath(folder)}#{digest(Path(folder) / WEIGHTS_FILE)[:16]}"


def _class_name(model: Any) -> str:
    return type(model).__name__


def _sentences(model: Any) -> Callable[[list[Any]], Tensor]:
    def encode(items: list[Any]) -> Tensor:
        return model.encode(items, convert_to_tensor=True, show_progress_bar=False)

    return encode


def _pooled(output: Any) -> Tensor:
    """[B, D] of an output of transformers: features, the pooled output, or the mean of hidden states."""
    if isinstance(output, Tensor):
        return output
    if (pooled := getattr(output, "pooler_output", None)) is not None:
        return pooled.flatten(1)
    hidden = output.last_hidden_state
    return hidden.mean(1) if hidden.dim() == 3 else hidden.mean((2, 3))


def _mean(
    hidden: Tensor,  # [B, L, D]
    mask: Tensor,  # [B, L]
) -> Tensor:  # [B, D]
    weight = mask.to(hidden)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
