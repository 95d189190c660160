"""Do VisualGPT's gates help where captions are few, and does CIDEr-D as a reward? Scenes never trained on.

    python -m benchmarks.visualgpt_experiment              seeds 0, 1, 2
    python -m benchmarks.visualgpt_experiment --seeds 0    one seed
    python -m benchmarks.visualgpt_experiment --quick      seconds, to try the script; numbers mean nothing

For each seed a language model learns all training captions without their images (`lm-scenes`). A VisualGPT
starts from it and learns from 1 % and from 5 % of the training scenes, once with gates and once with plain
cross-attention, as many steps each. The one with gates on 5 % goes on by self-critical training, on the
same scenes. All are judged on unseen combinations of the test scenes. Results are kept in
benchmarks/results/visualgpt/, a file for each seed, and the table is made of all that are there.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import experiment
from benchmarks.experiment import train_part
from vlmkernels.data import load_scenes
from vlmkernels.use.evaluate import evaluate

NAME = "visualgpt"
SCENES = 8000  # of training
SHARES = (1, 5)  # in percent
FUSIONS = {"srau": "gates (srau)", "residual": "plain cross-attention"}
STEPS, REWARDED_STEPS = 320, 60
BATCH = 32


def flags(size: int, steps: int, **values: Any) -> list[str]:
    """Flags of `vlmkernels train` for so many steps on the first scenes of the training split."""
    epochs = -(-steps // -(-size // BATCH))
    given = {"data_options": json.dumps({"size": size}), "epochs": epochs, "batch_size": BATCH, **values}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def run_seed(seed: int, out: Path, scenes: int, quick: bool) -> dict[str, Any]:
    """Train the models of a seed and judge them on ``scenes`` test scenes, those of seed 0."""
    out = out.absolute()
    language = out / f"lm-seed{seed}"
    trained = {"language_model": train_part("lm", "lm-scenes", seed, language, quick)}
    test, judged = load_scenes("test", size=scenes), {}

    def train(name: str, *words: str) -> Path:
        folder = out / f"{name}-seed{seed}"
        trained[name] = train_part("visualgpt", "visualgpt-scenes", seed, folder, quick, *words)
        found = evaluate(folder / "final", test, device="cpu")
        judged[name] = {**found.to_dict(), "captions": found.captions[:5]}
        return folder / "final"

    for share in SHARES:
        size = SCENES * share // 100
        for fusion in FUSIONS:
            options = json.dumps({"fusion": fusion})
            start = ["--language-model", str(language / "final"), "--model-options", options]
            final = train(f"{fusion}-{share}", *start, *flags(size, STEPS))
            if (fusion, share) == ("srau", SHARES[-1]):
                more = flags(size, REWARDED_STEPS, self_critical=5, lr=2e-4, model_options="{}")
                train("self_critical", "--init", str(final), *more)
    return {"trained": trained, "evaluation": judged}


def verdict(run: dict[str, Any]) -> dict[str, bool]:
    """The claims for each seed."""
    judged = run["evaluation"]
    cider = {name: found["reference_scores"]["CIDEr"] for name, found in judged.items()}
    slots = {name: found["slots"]["slots"] for name, found in judged.items()}
    held = {
        f"more slots right with gates at {share} %": slots[f"srau-{share}"] > slots[f"residual-{share}"]
        for share in SHARES
    }
    return {
        **held,
        "CIDEr-D is higher after self-critical training": cider["self_critical"]
        > cider[f"srau-{SHARES[-1]}"],
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the seeds, of slots and CIDEr-D also each seed's."""
    rows = {
        f"{fusion}-{share}": f"{title}, {share} %" for share in SHARES for fusion, title in FUSIONS.items()
    }
    rows["self_critical"] = f"gates, {SHARES[-1]} %, then self-critical training"
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
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the experiment; returns whether every claim holds."""
    args = experiment.parser_of(NAME, __doc__, scenes=1000).parse_args(arguments)
    scenes = 8 if args.quick else args.scenes
    results, held = experiment.each_seed(
        NAME, arguments, args, lambda seed: run_seed(seed, args.out, scenes, args.quick), verdict
    )
    print(f"{table(results)}\nResults: {experiment.folder_of(NAME, args)}")
    return held


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
