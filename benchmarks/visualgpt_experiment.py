"""Do VisualGPT's gates help where captions are few, and does CIDEr-D as a reward? Scenes never trained on.

    python -m benchmarks.visualgpt_experiment               seeds 0, 1, 2
    python -m benchmarks.visualgpt_experiment --parts rewards  one of the two questions: few, rewards
    python -m benchmarks.visualgpt_experiment --seeds 0     one seed
    python -m benchmarks.visualgpt_experiment --quick       to try the script; numbers mean nothing
    python -m benchmarks.visualgpt_experiment --write-docs  only the tables of docs/visualgpt.md, as stored

Few captions: as in the paper, what sees and what writes are there before. A tower (`clip-scenes`) and a
language model (`lm-scenes`: captions without images) are trained once, on other scenes. An image's regions
are the patch tokens of the frozen tower, each with its row and column, computed once. For each seed a
VisualGPT starts from the language model and learns 1 % and 5 % of 8,000 training scenes, other ones for each
seed, once with gates and once with plain cross-attention, as many steps each.

Rewards: one with gates learns 80 % and goes on by self-critical training on scenes that it has not learned,
once each, and, for comparison, by cross-entropy for as many steps of the same scenes.

All are judged on unseen combinations of the test scenes. A training that is in --out is not repeated. Results
are kept in benchmarks/results/visualgpt/, a file for each seed and part, and the tables are made of all that
are there.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
SCENES = 8000  # of training
FEW, MOST = (1, 5), 80  # percent of the scenes
STEPS = {1: 120, 5: 250, 80: 600}  # on so many percent of the scenes, which are read 24, 10 and 3 times
BATCHES = {1: 16, 5: 16, 80: 32}
FUSIONS = {"srau": "gates (srau)", "residual": "plain cross-attention"}
BEFORE = 100  # seed of the scenes that the tower and the language model learn
OTHERS = 200  # seed of the scenes for rewards, plus the seed
MORE_STEPS, MORE_BATCH = 32, 64
AFTER = {"epochs": 1, "batch_size": MORE_BATCH, "lr": 3e-5, "warmup_steps": 4, "model_options": "{}"}
START = f"srau-{MOST}"
MORE: dict[str, tuple[str, Result]] = {
    "self_critical": ("self-critical training", {"self_critical": 5}),
    "longer": ("as many more steps of cross-entropy", {}),
}


def words_of(values: Result) -> list[str]:
    """Flags of `vlmkernels train`."""
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def flags(table: Path, size: int, steps: int, batch: int, **values: Any) -> list[str]:
    """Flags of `vlmkernels train` for so many steps, of `size` scenes in a table, `batch` a step."""
    epochs = -(-steps // -(-size // batch))
    steady = {"data": table, "epochs": epochs, "max_steps": steps, "save_every": steps, "batch_size": batch}
    return words_of({**steady, "warmup_steps": 20, **values})


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


def judged(model: Path, data: Any) -> Result:
    """What a model's captions of scenes, or of their table, are worth."""
    found = evaluate(model, data, device="cpu")
    pairs = [(each["caption"], each["references"][0]) for each in found.captions]
    slots = slot_accuracy(*map(list, zip(*pairs, strict=True)))
    return {**found.to_dict(), "slots": slots, "captions": found.captions[:5]}


class Parts(NamedTuple):
    """What the models of a seed start from and learn."""

    before: Result
    tower: Any
    tables: dict[int, Path]  # by percent
    test: Path
    width: int  # of a region


def prepare(seed: int, out: Path, scenes: int, quick: bool, shares: Sequence[int]) -> Parts:
    """Language model and tower, trained once, and the tables of a seed and of ``scenes`` test scenes."""
    before = {kind: train_once(kind, f"{kind}-scenes", BEFORE, out / kind, quick) for kind in ("lm", "clip")}
    tower = load_bundle(out / "clip" / "final")
    sizes = [SCENES * share // 100 for share in shares]
    learned = load_scenes("train", size=max(sizes), seed=seed)
    tables = dict(zip(shares, write_tables(tower, learned, out / f"train-seed{seed}", sizes), strict=True))
    (test,) = write_tables(tower, load_scenes("test", size=scenes), out / "test", [scenes])
    return Parts(before, tower, tables, test, numpy.load(out / "test" / "0.npy").shape[1])


def learn(parts: Parts, fusion: str, share: int, seed: int, out: Path, quick: bool) -> tuple[Path, Result]:
    """The model of a seed that has learned so many percent, and what its training took."""
    options = {"image_size": None, "region_width": parts.width, "fusion": fusion}
    start = {"language_model": out / "lm" / "final", "model_options": json.dumps(options)}
    words = flags(parts.tables[share], SCENES * share // 100, STEPS[share], BATCHES[share], **start)
    folder = out / f"{fusion}-{share}-seed{seed}"
    took = train_once("visualgpt", "visualgpt-scenes", seed, folder, quick, *words)
    return folder / "final", took


def few(seed: int, out: Path, scenes: int, quick: bool) -> Result:
    """Train and judge a seed's models of few captions."""
    parts = prepare(seed, out, scenes, quick, FEW)
    trained, found = {}, {}
    for share in FEW:
        for fusion in FUSIONS:
            name = f"{fusion}-{share}"
            model, trained[name] = learn(parts, fusion, share, seed, out, quick)
            found[name] = judged(model, parts.test)
    return {"before": parts.before, "trained": trained, "evaluation": found}


def rewards(seed: int, out: Path, scenes: int, quick: bool) -> Result:
    """Train and judge what goes on from a seed's model with gates on most scenes."""
    parts = prepare(seed, out, scenes, quick, [MOST])
    start, took = learn(parts, "srau", MOST, seed, out, quick)
    size = MORE_STEPS * MORE_BATCH
    others = load_scenes("train", seed=OTHERS + seed, size=size)
    (table,) = write_tables(parts.tower, others, out / f"others-seed{seed}", [size])
    trained, found = {}, {START: judged(start, parts.test)}
    for name, (_, values) in MORE.items():
        words = words_of({"init": start, "data": table, **AFTER, **values})
        folder = out / f"{name}-seed{seed}"
        trained[name] = train_once("visualgpt", "visualgpt-scenes", seed, folder, quick, *words)
        found[name] = judged(folder / "final", parts.test)
    return {"before": {**parts.before, START: took}, "trained": trained, "evaluation": found}


def scores(run: Result) -> tuple[Result, Result]:
    """CIDEr-D and the fraction of right slots, of each model."""
    found = run["evaluation"]
    cider = {name: each["reference_scores"]["CIDEr"] for name, each in found.items()}
    return cider, {name: each["slots"]["slots"] for name, each in found.items()}


def few_verdict(run: Result) -> dict[str, bool]:
    """The claims for each seed about few captions."""
    cider, slots = scores(run)
    claims = {}
    for share in FEW:
        gates, plain = f"srau-{share}", f"residual-{share}"
        claims[f"CIDEr-D is higher with gates at {share} %"] = cider[gates] > cider[plain]
        claims[f"more slots right with gates at {share} %"] = slots[gates] > slots[plain]
    return claims


def rewards_verdict(run: Result) -> dict[str, bool]:
    """The claims for each seed about self-critical training."""
    cider, _ = scores(run)
    return {
        "CIDEr-D is higher after self-critical training": cider["self_critical"] > cider[START],
        "CIDEr-D is higher than after as much more cross-entropy": cider["self_critical"] > cider["longer"],
    }


class Part(NamedTuple):
    """A question: how it is run and judged, its result files, its place in the page, its table's rows."""

    run: Callable[[int, Path, int, bool], Result]
    verdict: Callable[[Result], dict[str, bool]]
    pattern: str
    title: str
    rows: dict[str, str]


PARTS = {
    "few": Part(
        few,
        few_verdict,
        "seed-*.json",
        "few captions",
        {f"{fusion}-{share}": f"{title}, {share} %" for share in FEW for fusion, title in FUSIONS.items()},
    ),
    "rewards": Part(
        rewards,
        rewards_verdict,
        "rewards-seed-*.json",
        "self-critical training",
        {START: f"gates (srau), {MOST} %", **{name: f"then {title}" for name, (title, _) in MORE.items()}},
    ),
}


def table(part: str, results: Sequence[Result]) -> str:
    """Markdown: means over the seeds, of slots and CIDEr-D also each seed's, and where the claims hold."""
    lines = ["| trained | slots right | whole scenes | CIDEr-D | perplexity |", "|---|---|---|---|---|"]
    for name, title in PARTS[part].rows.items():
        found = [result["evaluation"][name] for result in results]
        slots = [100 * one["slots"]["slots"] for one in found]
        cider = [one["reference_scores"]["CIDEr"] for one in found]
        whole = statistics.fmean(100 * one["slots"]["scenes"] for one in found)
        cells = [
            f"{statistics.fmean(slots):.1f} % ({', '.join(f'{value:.1f}' for value in slots)})",
            f"{whole:.1f} %",
            f"{statistics.fmean(cider):.2f} ({', '.join(f'{value:.2f}' for value in cider)})",
            f"{statistics.fmean(one['perplexity'] for one in found):.3f}",
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    seeds = ", ".join(str(result["seed"]) for result in results)
    taken = [sum(one["cpu_seconds"] for one in result["trained"].values()) / 60 for result in results]
    common = sum(one["cpu_seconds"] for one in results[0]["before"].values()) / 60
    machines = {result["machine"]["processor"] for result in results}
    cost = f"{statistics.fmean(taken):.1f} a seed, {common:.1f} for what they start from"
    note = f"Seeds {seeds}. CPU minutes of training: {cost}. Measured on {', '.join(sorted(machines))}."
    verdicts = [PARTS[part].verdict(result) for result in results]
    claims = [
        f"- {claim}: in {sum(each[claim] for each in verdicts)} of {len(verdicts)} seeds"
        for claim in verdicts[0]
    ]
    return "\n".join([*lines, "", note, "", *claims])


def with_tables(page: str, folder: Path) -> str:
    """The page with the tables of a folder's results between their markers. ValueError without these."""
    for name, part in PARTS.items():
        marks = f"<!-- visualgpt: {part.title} -->", "<!-- /visualgpt -->"
        page = experiment.between(page, marks, table(name, experiment.stored(folder, part.pattern)))
    return page


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the experiment; returns whether every claim holds."""
    parser = experiment.parser_of(NAME, __doc__, scenes=500)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--write-docs", action="store_true", help="only write the tables of docs/visualgpt.md"
    )
    args = parser.parse_args(arguments)
    folder, held = experiment.folder_of(NAME, args), True
    if args.write_docs:
        write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), folder))
        return held
    out, scenes = args.out.absolute(), 8 if args.quick else args.scenes
    for name in args.parts:
        part = PARTS[name]
        for seed in args.seeds:
            print(f"{part.title}, seed {seed}", flush=True)
            result = part.run(seed, out / "quick" if args.quick else out, scenes, args.quick)
            result["verdict"] = part.verdict(result)
            held = experiment.show(result["verdict"]) and held
            file = folder / part.pattern.replace("*", str(seed))
            experiment.write_result(file, {**experiment.origin(NAME, arguments), "seed": seed, **result})
        print(table(name, experiment.stored(folder, part.pattern)))
    print(f"Results: {folder}")
    return held


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
