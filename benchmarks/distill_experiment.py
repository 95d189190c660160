"""Does a small CLIP learn more with a teacher than alone, in the same steps on the same batches?

    python -m benchmarks.distill_experiment              seeds 0, 1, 2
    python -m benchmarks.distill_experiment --seeds 0    one seed
    python -m benchmarks.distill_experiment --quick      seconds, to try the script; numbers mean nothing

The teacher is trained once, by the configuration clip-emoji in 20 epochs. For each seed two students start
from the same weights and see the same batches, one in `vlmkernels train distill --config distill-emoji`, one
in `vlmkernels train clip` with the same settings. All are judged on the emoji in a style that none has seen.
A training whose result is in --out is not repeated. Results are kept in benchmarks/results/distill/, a file
for each seed, and the table is made of all that are there.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import demo, experiment
from benchmarks.experiment import once, train_part
from vlmkernels.data import load_emoji3
from vlmkernels.train import kinds, load_bundle
from vlmkernels.train.config import read_config, settings_of, write_config
from vlmkernels.use.evaluate import evaluate

NAME = "distill"
RESULTS = experiment.results_folder(NAME)
CONFIG = "distill-emoji"
TEACHER_EPOCHS = "20"  # twice the configuration's: one hardly better than its student teaches little
ROWS = {"teacher": "teacher", "alone": "student alone", "distilled": "student with the teacher"}
RECALLS = [(way, f"R@{k}") for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


def student_config(out: Path) -> Path:
    """The settings of the shipped configuration that are not those of distillation, as a file."""
    own = settings_of(kinds.find("distill").options)
    path = out / "alone.yaml"
    out.mkdir(parents=True, exist_ok=True)
    write_config(path, {name: value for name, value in read_config(CONFIG).items() if name not in own})
    return path


def judge(final: Path) -> dict[str, Any]:
    """The number of parameters, and retrieval on the unseen style: all of it, and without country flags."""
    parts = demo.judged_parts(load_emoji3("style-test"))
    return {
        "parameters": sum(p.numel() for p in load_bundle(final).model.parameters()),
        "retrieval": {name: evaluate(final, part, device="cpu").retrieval for name, part in parts},
    }


def run_part(kind: str, config: str, seed: int, folder: Path, quick: bool, *flags: str) -> dict[str, Any]:
    """Train and judge one model, unless an earlier call has."""
    return once(
        folder.with_suffix(".json"),
        lambda: {**train_part(kind, config, seed, folder, quick, *flags), **judge(folder / "final")},
    )


def run_seed(seed: int, out: Path, quick: bool) -> dict[str, Any]:
    """The teacher and the two students of a seed."""
    out = out.absolute()
    teacher, alone, distilled = (out / name for name in ("teacher", f"alone-{seed}", f"distilled-{seed}"))
    flags = ("--teacher", str(teacher / "final"))
    return {
        "teacher": run_part("clip", "clip-emoji", 0, teacher, quick, "--epochs", TEACHER_EPOCHS),
        "alone": run_part("clip", str(student_config(out)), seed, alone, quick),
        "distilled": run_part("distill", CONFIG, seed, distilled, quick, *flags),
    }


def mean_recall(judged: dict[str, Any], part: str) -> float:
    """Mean of R@1, R@5 and R@10 in both directions."""
    found = judged["retrieval"][part]
    return statistics.fmean(found[way][recall] for way, recall in RECALLS)


def verdict(results: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """The claims: same steps, a third of the teacher's parameters, and a better mean over the seeds."""
    parts = results[0]["teacher"]["retrieval"]

    def mean(row: str, part: str) -> float:
        return statistics.fmean(mean_recall(result[row], part) for result in results)

    return {
        "both students have the same steps": all(
            result["alone"]["steps"] == result["distilled"]["steps"] for result in results
        ),
        "the student has at most a third of the teacher's parameters": all(
            3 * result[row]["parameters"] <= result["teacher"]["parameters"]
            for result in results
            for row in ("alone", "distilled")
        ),
        **{
            f"higher mean recall with the teacher: {part}": mean("distilled", part) > mean("alone", part)
            for part in parts
        },
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the seeds, of the mean recall also each seed's, and what the trainings cost."""
    parts = list(results[0]["teacher"]["retrieval"])
    lines = [
        "| model | parameters | steps | CPU time | "
        + " | ".join(f"mean recall, {part} | R@1 | R@10" for part in parts)
        + " |",
        "|---|---|---|---|" + "---|---|---|" * len(parts),
    ]
    for row, title in ROWS.items():
        judged = [result[row] for result in (results[:1] if row == "teacher" else results)]
        seconds = statistics.fmean(one["cpu_seconds"] for one in judged)
        cells = [f"{judged[0]['parameters'] / 1e6:.2f} M", str(judged[0]["steps"]), f"{seconds:.0f} s"]
        for part in parts:
            each = [100 * mean_recall(one, part) for one in judged]
            seeds = f" ({', '.join(f'{value:.1f}' for value in each)})" if len(each) > 1 else ""
            cells.append(f"{statistics.fmean(each):.1f} %{seeds}")
            for recall in ("R@1", "R@10"):
                found = [
                    one["retrieval"][part][way][recall]
                    for one in judged
                    for way in ("image_to_text", "text_to_image")
                ]
                cells.append(f"{100 * statistics.fmean(found):.1f} %")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the experiment; returns whether every claim holds."""
    args = experiment.parser_of(NAME, __doc__).parse_args(arguments)
    results, _ = experiment.each_seed(
        NAME, arguments, args, lambda seed: run_seed(seed, args.out, args.quick)
    )
    held = experiment.show(verdict(results))
    print(f"{table(results)}\nResults: {experiment.folder_of(NAME, args)}")
    return held


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
