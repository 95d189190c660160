"""A training run of a fraction of a second, for the tests of the loop and of the command."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy
from PIL import Image
from safetensors.torch import load_file
from torch import nn

TINY_CLIP = {
    "embed_dim": 16,
    "image_size": 16,
    "vision_layers": 1,
    "vision_width": 16,
    "vision_heads": 2,
    "patch_size": 8,
    "text_width": 16,
    "text_layers": 1,
    "text_heads": 2,
    "context_length": 12,
    "vocab_size": 600,
}
TINY_ALIGN = {
    "embed_dim": 16,
    "image_size": 16,
    "image_width": 0.25,
    "image_depth": 0.1,
    "text_width": 16,
    "text_layers": 1,
    "text_heads": 2,
    "text_mlp_width": 32,
    "vocab_size": 200,
    "context_length": 12,
    "max_positions": 12,
}
TINY_LM = {"width": 16, "layers": 2, "heads": 2, "context_length": 24, "vocab_size": 602}
TINY_FLAMINGO = {
    "num_latents": 4,
    "resampler_depth": 1,
    "resampler_heads": 2,
    "resampler_dim_head": 8,
    "heads": 2,
    "dim_head": 8,
}
TINY_SIMVLM = {
    "image_size": 16,
    "conv_width": 4,
    "width": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "heads": 2,
    "context_length": 24,
    "vocab_size": 602,
}
TINY_VIRTEX = {
    "image_size": 16,
    "conv_width": 4,
    "width": 16,
    "heads": 2,
    "dropout": 0.0,
    "context_length": 24,
    "vocab_size": 602,
}
TINY_VISUALGPT = {
    "image_size": 16,
    "conv_blocks": [1, 1],
    "conv_width": 4,
    "width": 16,
    "encoder_layers": 2,
    "encoder_mlp_width": 32,
    "layers": 2,
    "heads": 2,
    "context_length": 24,
    "vocab_size": 602,
}
TINY_VISUALBERT = {
    "image_size": 16,
    "conv_blocks": (1, 1),
    "conv_width": 4,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "mlp_width": 32,
    "context_length": 16,
    "max_positions": 16,
    "vocab_size": 200,
}
TINY_VILD = {
    "detector": {
        "classes": 2,
        "class_agnostic": True,
        "conv_blocks": [1, 1, 1],
        "conv_width": 4,
        "frozen_norm": False,
        "width": 8,
        "box_width": 16,
        "mask_convs": 1,
        "min_size": 64,
        "max_size": 64,
        "anchor_sides": [16, 24, 32, 48],
        "rpn_before_nms": [40, 20],
        "rpn_after_nms": [20, 10],
        "rpn_samples": 16,
        "box_samples": 16,
        "score_threshold": 0.0,
        "candidates": 40,
        "detections": 5,
    },
}
TINY = {
    "clip": TINY_CLIP,
    "siglip": TINY_CLIP,
    "align": TINY_ALIGN,
    "lm": TINY_LM,
    "flamingo": TINY_FLAMINGO,
    "simvlm": TINY_SIMVLM,
    "virtex": TINY_VIRTEX,
    "visualgpt": TINY_VISUALGPT,
    "visualbert": TINY_VISUALBERT,
    "vild": TINY_VILD,
}
WORDS = ("red", "green", "blue", "dark", "light", "square", "stripe", "dot", "cross", "ring")


def write_pairs(folder: Path, count: int = 22) -> Path:
    """A table of small pictures of noise and captions of two words."""
    generator = numpy.random.default_rng(0)
    rows = ["filepath\ttitle"]
    for i in range(count):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(f"{i}.png\t{WORDS[i % 10]} {WORDS[(i // 10 + i) % 10]} {i}")
    table = folder / "pairs.tsv"
    table.write_text("\n".join(rows) + "\n")
    return table


def write_tar(table: Path, target: Path) -> Path:
    """The pairs of a table as a webdataset shard."""
    rows = [line.split("\t") for line in table.read_text().splitlines()[1:]]
    with tarfile.open(target, "w") as tar:
        for i, (file, text) in enumerate(rows):
            for suffix, content in (("png", (table.parent / file).read_bytes()), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return target


def tiny_values(table: Path, out: Path, kind: str = "clip", **values: Any) -> dict[str, Any]:
    """Values of a TrainConfig: 22 pairs in batches of 8, 8 and 6, with augmentation."""
    return {
        "data": str(table),
        "out": str(out),
        "model_options": TINY[kind],
        "augment": {"crop_scale": [0.5, 1.0], "flip": 0.5},
        "epochs": 4,
        "batch_size": 8,
        "lr": 3e-3,
        "warmup_steps": 2,
        "save_every": 1000,
        "tensorboard": False,
        "progress": False,
        **values,
    }


def train_parts(table: Path, folder: Path, lm_epochs: int = 20) -> dict[str, str]:
    """The two trained models that a Flamingo is put between, as its fields of a TrainConfig."""
    from vlmkernels.train import TrainConfig, train

    finals = {}
    for kind, epochs in (("clip", 2), ("lm", lm_epochs)):
        values = tiny_values(table, folder / kind, kind, epochs=epochs, lr=0.02)
        finals[kind] = str(train(kind, TrainConfig(**values)).final)
    return {"vision": finals["clip"], "language_model": finals["lm"]}


class per_sample_norm:
    """Every batch normalisation takes the statistics of each sample alone while the block runs."""

    def __enter__(self):
        self.forward = nn.BatchNorm2d.forward
        nn.BatchNorm2d.forward = lambda module, x: nn.functional.group_norm(
            x, 1, module.weight, module.bias, module.eps
        )

    def __exit__(self, *error):
        nn.BatchNorm2d.forward = self.forward


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "pairs_per_second")} for line in lines]


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "final" / "model.safetensors")


def assert_same_run(first: Path, second: Path) -> None:
    """Equal metrics and equal weights, bit for bit."""
    assert metrics(first) == metrics(second)
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a)
