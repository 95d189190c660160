"""Runs of every kind, as an earlier tree wrote them: ``tests/data/old_runs.tar.xz``, made by this file.

A run has 4 steps and the checkpoint of step 2, from which it can be resumed; its metrics are those of all
steps. Beside the runs lie the files they were configured by and what the commands printed about them. Written
once: what is changed must read it, so it is not to be written again.
"""

import contextlib
import io
import json
import lzma
import os
import sys
import tarfile
from pathlib import Path

import numpy
from PIL import Image

ARCHIVE = Path(__file__).parent / "data" / "old_runs.tar.xz"
CAPTIONS = (
    "red dot",
    "green dot",
    "blue ring",
    "red ring",
    "blue dot",
    "green ring",
    "dark dot",
    "dark ring",
)
CLIP = {
    "embed_dim": 4,
    "image_size": 8,
    "vision_layers": 1,
    "vision_width": 4,
    "vision_heads": 1,
    "patch_size": 4,
    "text_width": 4,
    "text_layers": 1,
    "text_heads": 1,
    "context_length": 16,
    "vocab_size": 514,
}
OPTIONS = {
    "clip": CLIP,
    "siglip": {**CLIP, "init_logit_bias": -2.0},
    "align": {
        "embed_dim": 4,
        "image_size": 16,
        "image_width": 0.05,
        "image_depth": 0.1,
        "text_width": 4,
        "text_layers": 1,
        "text_heads": 1,
        "text_mlp_width": 4,
        "vocab_size": 40,
        "context_length": 8,
        "max_positions": 8,
    },
    "lm": {"width": 4, "layers": 1, "heads": 1, "context_length": 48, "vocab_size": 516},
    "flamingo": {
        "num_latents": 2,
        "resampler_depth": 1,
        "resampler_heads": 1,
        "resampler_dim_head": 4,
        "heads": 1,
        "dim_head": 4,
    },
    "simvlm": {
        "image_size": 16,
        "conv_width": 1,
        "width": 4,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "heads": 1,
        "context_length": 16,
        "vocab_size": 516,
    },
}
LEFT_OUT = {"step-00000004", "align/final"}  # for the size; a resumed run writes them again
OWN = {
    "align": {"label_smoothing": 0.2, "optimizer": "sgd"},
    "lm": {"images_per_row": 2},
    "flamingo": {"vision": "clip/final", "language_model": "lm/final", "images_per_row": 2},
    "simvlm": {"optimizer": "sgd"},
}


def results(arguments: list[str]) -> str:
    """What a command prints."""
    from vlmkernels.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main(arguments)
    return printed.getvalue()


def write() -> None:
    """Write the runs into the present folder."""
    generator = numpy.random.default_rng(0)
    rows = ["filepath\ttitle"]
    for i, caption in enumerate(CAPTIONS):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=numpy.uint8)).save(f"{i}.png")
        rows.append(f"{i}.png\t{caption}")
    Path("pairs.tsv").write_text("\n".join(rows) + "\n")
    common = {
        "data": "pairs.tsv",
        "epochs": 2,
        "batch_size": 4,
        "lr": 0.01,
        "warmup_steps": 1,
        "save_every": 2,
    }
    common |= {"tensorboard": False, "progress": False, "augment": {"flip": 0.5}}
    for kind, options in OPTIONS.items():
        values = {**common, "model_options": options, **OWN.get(kind, {})}
        Path(f"{kind}.yaml").write_text(json.dumps(values))
        results(["train", kind, "--config", f"{kind}.yaml", "--out", kind])
        for name, more in (("json", ["--json"]), ("txt", [])):
            command = ["eval", "--model", f"{kind}/final", "--data", "pairs.tsv", *more]
            Path(f"{kind}-eval.{name}").write_text(results(command))
    for name, command in COMMANDS.items():
        Path(f"{name}.txt").write_text(results(command))
    ARCHIVE.parent.mkdir(exist_ok=True)
    with (
        lzma.open(ARCHIVE, "wb", preset=9 | lzma.PRESET_EXTREME) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for path in sorted(path for path in Path().rglob("*") if path.is_file()):
            if path.name != ".lock" and not LEFT_OUT.intersection((*path.parts, *map(str, path.parents))):
                tar.add(path)


COMMANDS = {
    "embed": ["embed", "--model", "clip/final", "--out", "images.npz", "0.png", "1.png"],
    "search": ["search", "--model", "align/final", "red dot", ".", "-k", "3", "--no-cache"],
    "caption-flamingo": ["caption", "--model", "flamingo/final", "0.png", "1.png", "--max-new-tokens", "6"],
    "caption-simvlm": [
        "caption",
        "--model",
        "simvlm/final",
        "0.png",
        "--prompt",
        "red",
        "--max-new-tokens",
        "6",
    ],
}

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    write()
