"""Does a small VisualBERT look at its images? Scenes with combinations of objects it was never trained on.

    python -m benchmarks.visualbert_experiment              seeds 0, 1, 2
    python -m benchmarks.visualbert_experiment --seeds 0    one seed
    python -m benchmarks.visualbert_experiment --quick      seconds, to try the script; numbers mean nothing
    python -m benchmarks.visualbert_experiment --head       step time and memory of the masked words' head

For each seed `vlmkernels train visualbert --config visualbert-scenes` is run twice, on smaller scenes of 12
objects for 1,000 steps: as it is, and as a control that never sees an image (`--image-dropout 1`). Both are
judged on test scenes: right captions against those of other scenes, and the perplexity of masked words, with
the scene's own image, with another one's and with none. A training whose result is in --out is not repeated.
Results are kept in benchmarks/results/visualbert/, a file for each seed, and the table is made of all that
are there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import demo
from benchmarks.flamingo_experiment import stored, train_part
from benchmarks.measure import pairs, peak_extra, spread
from vlmkernels._files import write_text
from vlmkernels.data import load_scenes
from vlmkernels.models.visualbert import VisualBERT, VisualBertConfig
from vlmkernels.use.evaluate import evaluate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "visualbert"
COMMAND = "python -m benchmarks.visualbert_experiment"
CONFIG = "visualbert-scenes"
SCENES = {"objects": 12, "image_size": 32}
NETWORK = {
    "image_size": 32,
    "vocab_size": 256,
    "conv_pool": True,
    "width": 64,
    "layers": 2,
    "mlp_width": 256,
    "init_std": 0.125,
}
SETTINGS = {"data-options": json.dumps(SCENES), "model-options": json.dumps(NETWORK)}
TRAININGS: dict[str, dict[str, Any]] = {"images": SETTINGS, "words": {**SETTINGS, "image-dropout": 1}}
ERRORS = 3  # standard errors by which a claim must hold
HEAD = "head.json"


def run_part(name: str, seed: int, out: Path, scenes: int, quick: bool) -> dict[str, Any]:
    """Train and judge one model, unless an earlier call has."""
    folder = out.absolute() / f"{name}-{seed}"
    result = folder.with_suffix(".json")
    if not result.is_file():
        flags = [word for key, value in TRAININGS[name].items() for word in (f"--{key}", str(value))]
        trained = train_part("visualbert", CONFIG, seed, folder, quick, *flags)
        test = load_scenes("test", size=scenes, **SCENES)
        judged = evaluate(folder / "final", test, batch_size=64, device="cpu")
        write_text(result, json.dumps({**trained, "judged": judged.to_dict()}, indent=1) + "\n")
    return json.loads(result.read_text(encoding="utf-8"))


def verdict(result: dict[str, Any]) -> dict[str, bool]:
    """The claims for each seed. Chance is 0.5; a control has to be nearer to it than ``ERRORS``.

    The perplexity without an image is the lower one of both models: the one that never saw an image expects
    the combinations of the training scenes, of which the test scenes have none.
    """
    judged = result["images"]["judged"]
    blind = min(result[name]["judged"]["perplexity"]["none"] for name in TRAININGS)
    own, another = (judged["match"][picture]["accuracy"] for picture in ("own", "another"))
    perplexity = judged["perplexity"]
    gains = judged["gain"]

    def above(score: dict[str, float], level: float = 0.0) -> bool:
        return score["value"] - level >= ERRORS * score["error"] and score["value"] > level

    return {
        f"right and wrong captions: {ERRORS} standard errors above chance": above(own, 0.5),
        "with another image: not so": not above(another, 0.5),
        f"masked words are likelier than without the image, by {ERRORS} standard errors": above(
            gains["none"]
        ),
        f"and than with another image, by {ERRORS} standard errors": above(gains["another"]),
        "lower perplexity than either model without an image": perplexity["own"] < blind,
        "with another image: not so, too": perplexity["another"] >= blind,
        "both have the same steps": result["images"]["steps"] == result["words"]["steps"],
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the seeds, and each seed's."""

    def cell(values: Sequence[float], form: str = "{:.3f}") -> str:
        each = f" ({', '.join(form.format(value) for value in values)})" if len(values) > 1 else ""
        return form.format(statistics.fmean(values)) + each

    lines = [
        "| model | image | accuracy of matching | standard error | ranked first | perplexity of words |",
        "|---|---|---|---|---|---|",
    ]
    titles = {"own": "its own", "another": "another scene's", "none": "none"}
    for picture, title in titles.items():
        judged = [result["images"]["judged"] for result in results]
        cells = ["–", "–", "–"]
        if picture in judged[0]["match"]:
            accuracy = [one["match"][picture]["accuracy"] for one in judged]
            ranking = [one["match"][picture]["ranking"]["value"] for one in judged]
            cells = [
                cell([one["value"] for one in accuracy]),
                f"{max(one['error'] for one in accuracy):.3f}",
                cell(ranking),
            ]
        cells.append(cell([one["perplexity"][picture] for one in judged], "{:.2f}"))
        lines.append(f"| trained with images | {title} | {' | '.join(cells)} |")
    blind = cell([result["words"]["judged"]["perplexity"]["none"] for result in results], "{:.2f}")
    lines.append(f"| trained without | none | – | – | – | {blind} |")
    return "\n".join(lines)


def head_works(quick: bool) -> tuple[dict[str, Callable[[], tuple]], list[torch.Tensor], dict[str, int]]:
    """A training step (forward and backward) by masked rows only and by all rows, on the same batch."""
    config = VisualBertConfig(dropout=0.0)
    if quick:
        config = VisualBertConfig(dropout=0.0, vocab_size=500, width=32, layers=1, heads=2, mlp_width=64)
    torch.manual_seed(0)
    model = VisualBERT(config).train()
    batch, length, regions = (2, 16, 4) if quick else (2, 128, 36)
    sizes = {"batch": batch, "tokens": length, "regions": regions, "vocabulary": config.vocab_size}
    tokens = torch.randint(1000 % config.vocab_size, config.vocab_size, (batch, length))
    features = torch.randn(batch, regions, 2048)
    labels = torch.where(torch.rand(batch, length) < 0.15, tokens, -100)
    labels[:, 1] = tokens[:, 1]
    match = torch.arange(batch) % 2 == 0
    weights = list(model.parameters())

    def step(loss: torch.Tensor) -> tuple:
        return (loss.detach(), *torch.autograd.grad(loss, weights))

    def masked_rows() -> tuple:
        return step(model(tokens, features, labels, match=match)["loss"])

    def all_rows() -> tuple:
        """As transformers computes it: logits of every token and region, most of which are then ignored."""
        out = model(tokens, features, match=match, return_logits=True)
        wide = F.pad(labels, (0, regions), value=-100).flatten()
        return step(F.cross_entropy(out["logits"].flatten(0, 1), wide) + out["match_loss"])

    return {"masked rows": masked_rows, "all rows": all_rows}, [*weights, tokens, features, labels], sizes


def measure_head(quick: bool) -> dict[str, Any]:
    """Seconds of a step and bytes at its peak, each way."""
    works, known, sizes = head_works(quick)
    first, second = (work()[0] for work in works.values())
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    rounds = (1, 1) if quick else (1, 3)
    ours, theirs = pairs(
        works["masked rows"],
        {"all rows": works["all rows"]},
        seconds=30.0,
        rounds=rounds,
        clock=time.process_time,
    )
    memory = {name: peak_extra(work, known) for name, work in works.items()}
    seconds = {"masked rows": ours, "all rows": [pair[1] for pair in theirs["all rows"]]}
    return {
        "sizes": sizes,
        "masked": int((known[-1] != -100).sum()),
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "bytes": memory,
    }


def head_table(found: dict[str, Any]) -> str:
    lines = ["| head computes | CPU time of a step | memory at the peak |", "|---|---|---|"]
    for name, times in found["seconds"].items():
        lines.append(f"| {name} | {times['median']:.2f} s | {found['bytes'][name] / 2**20:.0f} MiB |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the experiment; returns whether every claim holds."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=1000, help="test scenes")
    parser.add_argument("--quick", action="store_true", help="a few steps and scenes, to try the script")
    parser.add_argument("--head", action="store_true", help="measure the head instead")
    parser.add_argument("--out", type=Path, default=Path("runs/visualbert"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the result files")
    args = parser.parse_args(arguments)
    folder = args.results or (args.out if args.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:] if arguments is None else arguments
    origin = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*COMMAND.split(), *words]),
        "machine": demo.machine(),
    }
    if args.head:
        found = measure_head(args.quick)
        write_text(folder / HEAD, json.dumps({**origin, **found}, indent=1) + "\n")
        print(f"{found['masked']} masked tokens; {found['sizes']}\n{head_table(found)}")
        return found["bytes"]["masked rows"] < found["bytes"]["all rows"]
    held = True
    for seed in args.seeds:
        print(f"seed {seed}", flush=True)
        scenes = 32 if args.quick else args.scenes
        result = {name: run_part(name, seed, args.out, scenes, args.quick) for name in TRAININGS}
        for claim, holds in verdict(result).items():
            print(f"  {'yes' if holds else 'NO '} {claim}", flush=True)
            held = held and holds
        written = {**origin, "seed": seed, **result}
        write_text(folder / f"seed-{seed}.json", json.dumps(written, indent=1) + "\n")
    print(f"{table(stored(folder))}\nResults: {folder}")
    return held


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
