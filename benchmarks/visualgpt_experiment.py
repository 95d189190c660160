"""Do VisualGPT's gates help where captions are few, and does CIDEr-D as a reward? Scenes never trained on.

    python -m benchmarks.visualgpt_experiment               seeds 0, 1, 2
    python -m benchmarks.visualgpt_experiment --seeds 0     one seed
    python -m benchmarks.visualgpt_experiment --quick       to try the script; numbers mean nothing
    python -m benchmarks.visualgpt_experiment --write-docs  only the table of docs/visualgpt.md, as stored

As in the paper, what sees and what writes are there before. A tower (`clip-scenes`) and a language model
(`lm-scenes`: captions without images) are trained once, on other scenes. An image's regions are the patch
tokens of the frozen tower, each with its row and column, computed once. For each seed a VisualGPT starts from
the language model and learns 1 % and 5 % of 8,000 training scenes, other ones for each seed, once with gates
and once with plain cross-attention, as many steps each. The one with gates on 5 % goes on by self-critical
training on the same scenes, and, for comparison, by cross-entropy for as many steps. All are judged on unseen
combinations of the test scenes. A training that is in --out is not repeated. Results are kept in
benchmarks/results/visualgpt/, a file for each seed, and the table is made of all that are there.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks import experiment
from benchmarks.experiment import Result, once, train_part
from benchmarks.tower_probe import tokens_of
from vlmkernels._files import write_text
from vlmkernels.data import Scenes, load_scenes, slot_accuracy
from vlmkernels.use.bundle import load_bundle
from vlmkernels.use.evaluate import evaluate

NAME = "visualgpt"
PAGE = experiment.ROOT / "docs" / "visualgpt.md"
MARKS = "<!-- visualgpt: few captions -->", "<!-- /visualgpt -->"
SCENES = 8000  # of training
STEPS = {1: 120, 5: 250}  # on so many percent of the scenes, which are read 24 and 10 times
FUSIONS = {"srau": "gates (srau)", "residual": "plain cross-attention"}
LAST = 5
MORE_STEPS, MORE_BATCH = 24, 64  # rewards are noise for the most part: many captions a step
BATCH = 16
BEFORE = 100  # seed of the scenes that the tower and the language model learn
AFTER = {"lr": 2e-4, "warmup_steps": 4}
MORE = {
    "self_critical": ("self-critical training", {"self_critical": 5, **AFTER}),
    "longer": ("as many more steps of cross-entropy", AFTER),
}


def flags(table: Path, size: int, steps: int, batch: int = BATCH, **values: Any) -> list[str]:
    """Flags of `vlmkernels train` for so many steps, of `size` scenes in a table."""
    epochs = -(-steps // -(-size // batch))
    steady = {"data": table, "epochs": epochs, "max_steps": steps, "save_every": steps, "batch_size": batch}
    given = {**steady, "warmup_steps": 20, **values}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def with_places(tokens: Tensor) -> Tensor:  # [N, s^2, D] -> [N, s^2, D + 2 s]
    """Patch tokens, each with its row and its column."""
    side = math.isqrt(tokens.shape[1])
    row, column = torch.eye(side).repeat_interleave(side, 0), torch.eye(side).repeat(side, 1)
    places = torch.cat([row, column], 1).expand(len(tokens), -1, -1)
    return torch.cat([tokens, places], 2)


def write_tables(bundle: Any, scenes: Scenes, folder: Path, sizes: Sequence[int]) -> list[Path]:
    """The regions of each scene in a file of its own, and a table of the first scenes for each size.

    What an earlier call has written is not computed again.
    """
    tables = [folder.with_name(f"{folder.name}-{size}.tsv") for size in sizes]
    if all(table.is_file() for table in tables):
        return tables
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["filepath\ttitle"]
    for index, regions in enumerate(with_places(tokens_of(bundle, scenes))):
        numpy.save(folder / f"{index}.npy", regions.numpy())
        lines.append(f"{folder.name}/{index}.npy\t{scenes.scene(index).caption}")
    for size, table in zip(sizes, tables, strict=True):
        write_text(table, "\n".join(lines[: size + 1]) + "\n")
    return tables


def train_once(kind: str, config: str, seed: int, folder: Path, quick: bool, *words: str) -> Result:
    """Train a model, unless an earlier call has."""
    return once(folder.with_suffix(".json"), lambda: train_part(kind, config, seed, folder, quick, *words))


def run_seed(seed: int, out: Path, scenes: int, quick: bool) -> Result:
    """Train the models of a seed and judge them on ``scenes`` test scenes, those of seed 0."""
    out = out.absolute() / "quick" if quick else out.absolute()
    before = {kind: train_once(kind, f"{kind}-scenes", BEFORE, out / kind, quick) for kind in ("lm", "clip")}
    tower = load_bundle(out / "clip" / "final")
    sizes = [SCENES * share // 100 for share in STEPS]
    learned = load_scenes("train", size=max(sizes), seed=seed)
    tables = dict(zip(STEPS, write_tables(tower, learned, out / f"train-seed{seed}", sizes), strict=True))
    (test,) = write_tables(tower, load_scenes("test", size=scenes), out / "test", [scenes])
    width = numpy.load(out / "test" / "0.npy").shape[1]
    trained, judged = {}, {}

    def train(name: str, share: int, *steps: int, **values: Any) -> Path:
        folder = out / f"{name}-seed{seed}"
        words = flags(tables[share], SCENES * share // 100, *steps, **values)
        trained[name] = train_once("visualgpt", "visualgpt-scenes", seed, folder, quick, *words)
        found = evaluate(folder / "final", test, device="cpu")
        pairs = [(each["caption"], each["references"][0]) for each in found.captions]
        slots = slot_accuracy(*map(list, zip(*pairs, strict=True)))
        judged[name] = {**found.to_dict(), "slots": slots, "captions": found.captions[:5]}
        return folder / "final"

    for share, steps in STEPS.items():
        for fusion in FUSIONS:
            options = {"image_size": None, "region_width": width, "fusion": fusion}
            start = {"language_model": out / "lm" / "final", "model_options": json.dumps(options)}
            final = train(f"{fusion}-{share}", share, steps, **start)
            if (fusion, share) == ("srau", LAST):
                for name, (_, values) in MORE.items():
                    train(name, LAST, MORE_STEPS, MORE_BATCH, init=final, model_options="{}", **values)
    return {"before": before, "trained": trained, "evaluation": judged}


def verdict(run: Result) -> dict[str, bool]:
    """The claims for each seed."""
    judged = run["evaluation"]
    cider = {name: found["reference_scores"]["CIDEr"] for name, found in judged.items()}
    slots = {name: found["slots"]["slots"] for name, found in judged.items()}
    rewarded, start = cider["self_critical"], cider[f"srau-{LAST}"]
    return {
        **{
            f"more slots right with gates at {share} %": slots[f"srau-{share}"] > slots[f"residual-{share}"]
            for share in STEPS
        },
        "CIDEr-D is higher after self-critical training": rewarded > start,
        "and higher than after as much more cross-entropy": rewarded > cider["longer"],
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the seeds, of slots and CIDEr-D also each seed's."""
    rows = {
        f"{fusion}-{share}": f"{title}, {share} %" for share in STEPS for fusion, title in FUSIONS.items()
    }
    rows |= {name: f"gates, {LAST} %, then {title}" for name, (title, _) in MORE.items()}
    lines = ["| trained | slots right | whole scenes | CIDEr-D | perplexity |", "|---|---|---|---|---|"]
    for name, title in rows.items():
        judged = [result["evaluation"][name] for result in results]
        slots = [100 * one["slots"]["slots"] for one in judged]
        cider = [one["reference_scores"]["CIDEr"] for one in judged]
        whole = statistics.fmean(100 * one["slots"]["scenes"] for one in judged)
        cells = [
            f"{statistics.fmean(slots):.1f} % ({', '.join(f'{value:.1f}' for value in slots)})",
            f"{whole:.1f} %",
            f"{statistics.fmean(cider):.2f} ({', '.join(f'{value:.2f}' for value in cider)})",
            f"{statistics.fmean(one['perplexity'] for one in judged):.3f}",
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    seeds = ", ".join(str(result["seed"]) for result in results)
    taken = [sum(part["cpu_seconds"] for part in result["trained"].values()) / 60 for result in results]
    common = sum(part["cpu_seconds"] for part in results[0]["before"].values()) / 60
    machines = {result["machine"]["processor"] for result in results}
    cost = f"{statistics.fmean(taken):.1f} a seed, {common:.1f} for the tower and the language model"
    note = f"Seeds {seeds}. CPU minutes of training: {cost}. Measured on {', '.join(sorted(machines))}."
    return "\n".join([*lines, "", note])


def with_table(page: str, results: Sequence[Result]) -> str:
    """The page with the table between its markers. ValueError if it has not these markers."""
    return experiment.between(page, MARKS, table(results))


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the experiment; returns whether every claim holds."""
    parser = experiment.parser_of(NAME, __doc__, scenes=500)
    parser.add_argument("--write-docs", action="store_true", help="only write the table of docs/visualgpt.md")
    args = parser.parse_args(arguments)
    scenes = 8 if args.quick else args.scenes
    results, held = experiment.seeds_or_page(
        NAME,
        arguments,
        args,
        lambda seed: run_seed(seed, args.out, scenes, args.quick),
        verdict,
        PAGE,
        with_table,
    )
    print(f"{table(results)}\nResults: {experiment.folder_of(NAME, args)}")
    return held


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
