"""Captions by MAGIC: a language model that never saw an image, guided by a model that scores them."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmkernels.data.gpt2_tokenizer import Gpt2Tokenizer
from vlmkernels.models.magic import (
    ALPHA,
    BETA,
    MAGIC,
    NEW_TOKENS,
    ASIFScorer,
    DualEncoderScorer,
    K,
    Scorer,
    longest_text,
)
from vlmkernels.models.parts.anchors import MANIFEST
from vlmkernels.models.parts.pretrained import read_config
from vlmkernels.train import kinds

from .asif import open_asif
from .bundle import check_batch_size, inference, load_model, usable
from .caption import Captioned
from .images import find_images, read_files

GPT2 = "gpt2"  # the model_type of Hugging Face's folders
ASIF = "asif"  # as a scorer: with the packaged encoders and the embedded anchors
START = "<-start_of_text->"  # of the paper's language models


@dataclasses.dataclass(frozen=True)
class Writer:
    """A language model with its text: ids of a text, text of ids, the first token, the end."""

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    start: int
    end: int

    def prompts(self, prompt: str, count: int) -> Tensor:  # [count, T] int64
        ids = [self.start, *self.encode(prompt)]
        return torch.tensor([ids], device=next(self.model.parameters()).device).expand(count, -1)

    def text(self, ids: Sequence[int]) -> str:
        """Up to the end, on one line."""
        ids = list(ids)
        return " ".join(self.decode(ids[: ids.index(self.end)] if self.end in ids else ids).split())


@dataclasses.dataclass(frozen=True)
class Judge:
    """A scorer with what it needs of images: `transform` of each, then `encode` of the results.

    Its logits are cosines times `scale`.
    """

    scorer: Scorer
    scale: float
    transform: Callable[[Image.Image], Any]
    encode: Callable[[list[Any]], Tensor]  # -> [B, D]


def load_writer(folder: str | os.PathLike[str], device: str = "auto") -> Writer:
    """The language model in a folder: RUN/final of `vlmkernels train`, or a GPT-2 of Hugging Face.

    FileNotFoundError or ValueError name what is missing or invalid.
    """
    blind = [kind for kind in kinds.every() if not kind.sees_images]
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"language_model: folder {folder} does not exist")
    if read_config(Path(folder)).get("model_type") == GPT2:
        model = blind[0].model.from_hf_folder(folder).to(usable(device))  # type: ignore[attr-defined]
        text = Gpt2Tokenizer(folder)
        if text.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"language_model: the tokenizer in {folder} must have at most the model's "
                f"{model.config.vocab_size} ids, got {text.vocab_size}"
            )
        start = text.id_of(START)
        return Writer(model, text.encode, text.decode, text.end_id if start is None else start, text.end_id)
    model, tokenizer, _ = load_model(folder, device, fitting=blind)
    start = kinds.of_model(model).first_token(tokenizer)
    return Writer(model, tokenizer.encode, tokenizer.decode, start, tokenizer.endofchunk_id)


def load_judge(folder: str | os.PathLike[str], device: str = "auto") -> Judge:
    """The scorer in a folder: RUN/final of a model that embeds images and texts, or anchors of ASIF.

    "asif" is ASIF with the encoders that packages ship and the embedded emoji as anchors. FileNotFoundError
    or ValueError name what is missing or invalid, ModuleNotFoundError a package.
    """
    if str(folder) == ASIF or (Path(folder) / MANIFEST).is_file():
        asif: Any = open_asif(None if str(folder) == ASIF else folder, device=device)
        scorer, encoder = ASIFScorer(asif), asif.image_encoder
        return Judge(scorer, scorer.scale, encoder.prepare, encoder.encode)
    model, tokenizer, transform = load_model(folder, device)

    dual: Any = model

    def encode(images: list[Tensor]) -> Tensor:
        with inference(model) as place:
            return dual.encode_image(torch.stack(images).to(place), normalize=True)

    return Judge(DualEncoderScorer(model, tokenizer), dual.scale().item(), transform, encode)


def write_guided(
    writer: Writer,
    judge: Judge,
    image_features: Tensor,  # [B, ...]
    *,
    prompt: str = "",
    alpha: float = ALPHA,
    beta: float = BETA,
    k: int = K,
    length: int = NEW_TOKENS,
) -> list[str]:
    """A caption for each image, by :meth:`MAGIC.generate`; with ``prompt``, which is its start.

    ``length`` is the largest number of tokens after it, the end included. ValueError names what is invalid.
    """
    prompts = writer.prompts(prompt, len(image_features))
    faults, longest = [], longest_text(writer.model)
    if length < 1:
        faults.append(f"length must be at least 1, got {length}")
    elif longest is not None and prompts.shape[1] + length > longest:
        given = f"{prompts.shape[1] - 1} and {length}"
        faults.append(f"prompt and length must be at most {longest - 1} tokens together, got {given}")
    if faults:
        raise ValueError("; ".join(faults))
    search = MAGIC(writer.model, judge.scorer, decode=writer.decode, eos_token_id=writer.end)
    with inference(writer.model):
        tokens = search.generate(prompts, image_features, max_new_tokens=length, k=k, alpha=alpha, beta=beta)
    return [writer.text([*prompts[0, 1:].tolist(), *row]) for row in tokens.tolist()]


def magic(
    inputs: Sequence[str | os.PathLike[str]],
    language_model: str | os.PathLike[str],
    scorer: str | os.PathLike[str],
    *,
    batch_size: int = 16,
    device: str = "auto",
    **options: Any,
) -> Captioned:
    """Captions of image files, and of the images below folders.

    ``language_model`` is a folder for :func:`load_writer`, ``scorer`` one for :func:`load_judge`; ``options``
    are those of :func:`write_guided`. An image that cannot be read is skipped and listed in the result.
    FileNotFoundError or ValueError name what is missing or invalid.
    """
    check_batch_size(batch_size)
    if isinstance(inputs, (str, os.PathLike)):
        raise ValueError(f"inputs must be a sequence of paths, got one {type(inputs).__name__}")
    files = find_images(inputs)
    writer, judge = load_writer(language_model, device), load_judge(scorer, device)
    skipped: dict[str, str] = {}
    done: list[tuple[Path, str]] = []
    pictures = read_files(judge.transform, files, skipped)
    while batch := list(itertools.islice(pictures, batch_size)):
        features = judge.encode([image for _, image in batch])
        texts = write_guided(writer, judge, features, **options)
        done += zip((file for file, _ in batch), texts, strict=True)
    return Captioned(done, skipped)
