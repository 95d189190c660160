"""The demo: train a small CLIP on the embedded pictures, judge it on a style it never saw, time its loss; and
search by text with two encoders that were not trained for it.

python -m benchmarks.demo            # minutes; writes runs/demo/report.html
python -m benchmarks.demo --quick    # seconds, to see that everything runs; the numbers mean nothing
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import vlmkernels
from benchmarks import demo_asif, demo_report, demo_timing
from benchmarks import run as bench
from vlmkernels._files import write_text
from vlmkernels.data import Emoji3, load_emoji3
from vlmkernels.models.parts.pretrained import read_config as read_model_config
from vlmkernels.train import TrainConfig, train
from vlmkernels.train.config import read_config
from vlmkernels.use.bundle import load_model
from vlmkernels.use.embed import encode_images, encode_texts
from vlmkernels.use.evaluate import evaluate_model, ranks

CONFIG = "clip-emoji-demo"
FLAGS = "flags"
TEXTS = 10  # texts whose pictures are shown, evenly spaced over the concepts
SHOWN = 6
FREE_TEXTS = ("something to drink", "a happy face", "a red fruit")


class Part(Dataset):
    """The samples of a data set at some indices, still with its classes."""

    def __init__(self, whole: Emoji3, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, list(indices)
        self.split, self.group_names = whole.split, whole.group_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self.indices):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        return self.whole[self.indices[index]]


def without_flags(dataset: Emoji3) -> Part:
    """Fluent's country flags have Noto's design, so these are not of an unseen style."""
    flags = dataset.group_names.index(FLAGS)
    return Part(dataset, [i for i, group in enumerate(dataset.groups) if group != flags])


def judged_parts(test: Emoji3) -> list[tuple[str, Dataset]]:
    """What the model is judged on: the whole unseen style, then without flags."""
    return [("Fluent, the unseen style", test), ("the same without flags", without_flags(test))]


@contextlib.contextmanager
def stage(title: str, seconds: dict[str, float]) -> Iterator[None]:
    """A heading on the terminal, and the time of the block."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    seconds[title] = time.perf_counter() - start


def train_model(run: Path, *, quick: bool, epochs: int | None, seed: int, progress: bool) -> dict[str, Any]:
    """Train as the configuration clip-emoji-demo says, into the folder ``run``, which is made anew."""
    options: dict[str, Any] = {
        **read_config(CONFIG),
        "out": str(run),
        "seed": seed,
        "progress": progress,
    }
    options |= {"keep": 1, "tensorboard": False} | ({} if epochs is None else {"epochs": epochs})
    if quick:
        options |= {"epochs": 1, "max_steps": 4, "batch_size": 32, "warmup_steps": 2}
    config = TrainConfig(**options)
    if (run / "config.yaml").is_file():
        shutil.rmtree(run)
    summary = train("clip", config)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        **{k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(summary).items()},
        "config": config.to_dict(),
        "curve": [{key: line[key] for key in ("step", "loss", "retrieval_at_1")} for line in lines],
    }


def judge(bundle: tuple[Any, Any, Any], quick: bool) -> dict[str, Any]:
    """Retrieval and zero-shot accuracy on the unseen style (also without flags) and the trained ones."""
    test, seen = load_emoji3("style-test"), load_emoji3("style-train")
    parts: list[tuple[str, Dataset]] = [*judged_parts(test), ("Noto and Twemoji, trained on", seen)]
    if quick:
        parts = [("the first 60 of the unseen style", Part(test, range(60)))]
    return {name: evaluate_model(*bundle, part).to_dict() for name, part in parts}


def pictures(bundle: tuple[Any, Any, Any], quick: bool) -> dict[str, Any]:
    """The pictures nearest to some texts and the texts nearest to some pictures, all of the unseen style."""
    model, tokenizer, transform = bundle
    test = load_emoji3("style-test")
    count = 60 if quick else len(test)
    images = encode_images(
        model, (torch.stack([transform(test[i]["image"]) for i in part]) for part in _batches(count, 256))
    )
    texts = encode_texts(model, tokenizer, test.names[:count])
    shown = [i for i in range(count) if test.group_names[test.groups[i]] != FLAGS]
    shown = shown[:: math.ceil(len(shown) / TEXTS)]

    def best(query: Tensor, key: Tensor, k: int) -> list[int]:
        return (key @ query).argsort(descending=True, stable=True)[:k].tolist()

    def hit(i: int, right: bool | None) -> dict[str, Any]:
        return {"image": test[i]["image"], "name": test.names[i], "right": right}

    matches = torch.tensor(list(enumerate(shown)))  # [T, 2]
    places = ranks(texts[shown], images, matches).tolist()
    free = encode_texts(model, tokenizer, FREE_TEXTS)
    return {
        "pictures": count,
        "texts": [
            {
                "text": test.names[i],
                "place": place,
                "hits": [hit(j, j == i) for j in best(texts[i], images, SHOWN)],
            }
            for i, place in zip(shown, places, strict=True)
        ],
        "free": [
            {"text": text, "hits": [hit(j, None) for j in best(feature, images, SHOWN)]}
            for text, feature in zip(FREE_TEXTS, free, strict=True)
        ],
        "images": [
            {
                **hit(i, None),
                "hits": [{"name": test.names[j], "right": j == i} for j in best(images[i], texts, 3)],
            }
            for i in shown
        ],
    }


def _batches(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def machine() -> dict[str, str]:
    """The processor, memory and versions that the numbers belong to."""
    threads = torch.get_num_threads()
    header = bench.header_of("", "cpu", threads)
    found = {
        "processor": header["cpu"],
        "instruction sets": header["isa"],
        "cores, threads used": f"{os.cpu_count()}, {threads}",
        "system": f"{platform.system()} {platform.machine()}",
        "commit": header["commit"][:12] + (" with changes" if header["dirty"] else ""),
        **header["versions"],
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    return found


def run(out: Path, *, quick: bool, epochs: int | None, seed: int, progress: bool = True) -> Path:
    """The whole demo; gives the path of the report."""
    seconds: dict[str, float] = {}
    out.mkdir(parents=True, exist_ok=True)
    print("vlmkernels demo: a small CLIP from scratch on 1,852 emoji, with the fused contrastive loss")
    with stage("Training on two drawing styles", seconds):
        training = train_model(out / "run", quick=quick, epochs=epochs, seed=seed, progress=progress)
        rate = f"{training['pairs_per_second']:.0f} pairs/s"
        print(f"{training['steps']} steps, last loss {training['loss']:.3f}, {rate}")
    bundle = load_model(training["final"])
    training["parameters"] = sum(parameter.numel() for parameter in bundle[0].parameters())
    with stage("Judging on a third style that was never seen", seconds):
        judged = judge(bundle, quick)
        print(demo_report.evaluation_text(judged))
        found = pictures(bundle, quick)
    batch = training["config"]["batch_size"], read_model_config(training["final"])["embed_dim"]
    with stage("Timing the loss, forward and backward", seconds):
        sizes = [(32, 16), (64, 32)] if quick else [batch, (4096, 512)]
        timings = demo_timing.measure_losses(sizes, 0.2 if quick else 20.0, quick=quick)
        print(demo_report.timing_text(timings))
    with stage("Searching by text without training: two encoders that never saw each other", seconds):
        found["asif"] = demo_asif.search(quick)
        print(demo_asif.text(found["asif"]))
    results = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.demo" + (" " + " ".join(sys.argv[1:]) if sys.argv[1:] else ""),
        "quick": quick,
        "machine": machine(),
        "kernels": str(vlmkernels.info()),
        "seconds": seconds,
        "training": training,
        "evaluation": judged,
        "timings": timings,
    }
    text = json.dumps(results, indent=1) + "\n"
    write_text(out / "results.json", text)
    report = out / "report.html"
    page = demo_report.render(results, found)
    write_text(report, page)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of the report and the model"
    )
    parser.add_argument(
        "--epochs", type=int, help=f"passes over the training pictures; {CONFIG}.yaml says how many"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes; the numbers mean nothing"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    report = run(
        args.out, quick=args.quick, epochs=args.epochs, seed=args.seed, progress=not args.no_progress
    )
    print(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes.")
    print(f"Model:  {args.out / 'run' / 'final'}")
    print(f"Report: {report.resolve()}")


if __name__ == "__main__":
    main()
