"""The captioners beside each other: captions of scenes whose combinations of objects no training scene has.

    python -m benchmarks.captioners_experiment                                   every system, seed 0
    python -m benchmarks.captioners_experiment --systems flamingo --seeds 0 1 2  some of them, three seeds
    python -m benchmarks.captioners_experiment --quick          to try the script; numbers mean nothing
    python -m benchmarks.captioners_experiment --write-docs     only docs/captioners.md, from stored results

Each system is trained by its shipped configurations, each a call of `vlmkernels train`, and captions 1,000
test scenes. Flamingo and VisualGPT start from the language model of `lm-scenes`, which is trained once and
counted in both. A Flamingo then captions scenes without their images (`benchmarks.reading`), and linear
classifiers read what the tokens of its frozen tower hold (`benchmarks.tower_probe`). One that was trained on
rows of several scenes reads a few captioned ones before the one to caption, in which an object has a name
that no training caption has (`benchmarks.shots`). A training or an evaluation whose result is in --out is not
repeated. Results are kept in benchmarks/results/captioners/, a file for each system and seed, and the tables
are made of all that are there.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import experiment, reading, shots, tower_probe
from benchmarks.experiment import Result, once, train_part
from vlmkernels._files import write_text
from vlmkernels.data import load_scenes
from vlmkernels.use.bundle import load_bundle
from vlmkernels.use.evaluate import evaluate

NAME = "captioners"
PAGE = experiment.ROOT / "docs" / "captioners.md"
LANGUAGE, VISION = "--language-model", "--vision"
SYSTEMS: dict[str, dict[str, str]] = {  # for each system the models that it starts from, by flag
    "simvlm": {},
    "virtex": {},
    "visualgpt": {LANGUAGE: "lm"},
    "flamingo": {VISION: "clip", LANGUAGE: "lm"},
    "flamingo-shots": {VISION: "clip", LANGUAGE: "lm-shots"},
}
TITLES = {
    "simvlm": "SimVLM",
    "virtex": "VirTex",
    "visualgpt": "VisualGPT",
    "flamingo": "Flamingo",
    "flamingo-shots": "Flamingo, for shots",
}
SCORES = {"slots": "slots", "objects": "objects", "relations": "relations", "scenes": "whole scenes"}
# Of Flamingo: frozen parts that hold what is where lose little. Two processors have 12 CPU minutes in six.
GOAL = {"slots": 0.9, "cpu_minutes": 12.0}


def train(part: str, seed: int, out: Path, quick: bool, *flags: str) -> tuple[Path, Result]:
    """A model by its shipped configuration, trained unless an earlier call has: its folder, what it took.

    ``part`` is KIND, of the configuration KIND-scenes, or KIND-shots.
    """
    folder, kind = out.absolute() / f"{part}-seed{seed}", part.partition("-")[0]
    config = f"{part}-scenes" if part == kind else part
    figures = once(folder.with_suffix(".json"), lambda: train_part(kind, config, seed, folder, quick, *flags))
    return folder / "final", figures


def run(system: str, seed: int, out: Path, scenes: int, quick: bool) -> Result:
    """Train a system and the models it starts from; judge it on ``scenes`` test scenes, those of seed 0."""
    flags: list[str] = []
    trained = {}
    for flag, part in SYSTEMS[system].items():
        final, trained[part] = train(part, seed, out, quick)
        flags += [flag, str(final)]
    final, trained[system] = train(system, seed, out, quick, *flags)

    def judge() -> Result:
        found = evaluate(final, load_scenes("test", size=scenes), device="cpu")
        bundle = load_bundle(final)
        judged: dict[str, Any] = {
            "parameters": sum(p.numel() for p in bundle.model.parameters()),
            "trained_parameters": sum(p.numel() for p in bundle.model.parameters() if p.requires_grad),
            "evaluation": {**found.to_dict(), "captions": found.captions[:5]},
        }
        if system == "flamingo":
            tower, language_model = (
                out.absolute() / f"{kind}-seed{seed}" / "final" for kind in ("clip", "lm")
            )
            judged["reading"] = reading.measure(final, language_model, 8 if quick else reading.SCENES)
            judged["tower"] = tower_probe.probe_tower(tower, (40, 20) if quick else tower_probe.SCENES)
        if system == "flamingo-shots":
            judged["shots"] = shots.measure(bundle, 8 if quick else shots.EPISODES)
        return judged

    judged = once(out.absolute() / f"{system}-seed{seed}-judged.json", judge)
    return {"system": system, "seed": seed, "trained": trained, **judged}


def minutes(result: Result) -> float:
    """CPU minutes of all trainings of a system."""
    return sum(part["cpu_seconds"] for part in result["trained"].values()) / 60


def verdict(results: Sequence[Result]) -> dict[str, bool]:
    """The claims about each Flamingo: near those that train everything, as quickly, and from its images."""
    claims = {}
    for result in results:
        if result["system"] == "flamingo":
            slots, taken = result["evaluation"]["slots"]["slots"], minutes(result)
            claims[f"seed {result['seed']}: at least {GOAL['slots']:.0%} of the slots"] = (
                slots >= GOAL["slots"]
            )
            within = f"within {GOAL['cpu_minutes']:g} CPU minutes"
            claims[f"seed {result['seed']}: {within}"] = taken <= GOAL["cpu_minutes"]
            kept = f"at most {reading.KEPT:.0%} of the gain with other images"
            claims[f"seed {result['seed']}: {kept}"] = reading.reads(result)
    return claims


def each(values: Sequence[float], form: str) -> str:
    """The mean, and of several seeds each."""
    seeds = f" ({', '.join(form.format(value) for value in values)})" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + seeds


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each system, means over its seeds, of the scores of slots also each seed's."""
    columns = ["seeds", *SCORES.values(), "CIDEr", "training, CPU minutes", "parameters", "trained"]
    lines = [f"| system | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for system, title in TITLES.items():
        mine = [result for result in results if result["system"] == system]
        if not mine:
            continue
        slots = [result["evaluation"]["slots"] for result in mine]
        cells = [", ".join(str(result["seed"]) for result in mine)]
        cells += [f"{each([100 * found[score] for found in slots], '{:.1f}')} %" for score in SCORES]
        scores = [result["evaluation"]["reference_scores"] for result in mine]
        cells.append(f"{statistics.fmean(found['CIDEr'] for found in scores):.2f}" if all(scores) else "–")
        parts = {
            kind: statistics.fmean(result["trained"][kind]["cpu_seconds"] / 60 for result in mine)
            for kind in mine[0]["trained"]
        }
        sums = f"{sum(parts.values()):.1f}"
        named = ", ".join(f"{kind} {taken:.1f}" for kind, taken in parts.items())
        cells.append(f"{sums} ({named})" if len(parts) > 1 else sums)
        cells += [f"{mine[0][count] / 1e6:.2f} M" for count in ("parameters", "trained_parameters")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured_on(results: Sequence[Result]) -> str:
    """The machines of the results."""
    names = ("processor", "instruction sets", "torch")
    machines = {", ".join(result["machine"][name] for name in names) for result in results}
    return f"Measured on: {'; '.join(sorted(machines))}."


def with_tables(page: str, results: Sequence[Result]) -> str:
    """The page with the tables between their markers. ValueError if it has not these markers."""
    flamingos, for_shots = (
        [result for result in results if result["system"] == system]
        for system in ("flamingo", "flamingo-shots")
    )
    tables = {
        "table": f"{table(results)}\n\n{measured_on(results)}",
        "reading": reading.table(flamingos) if flamingos else "",
        "tower": tower_probe.table(flamingos) if flamingos else "",
        "shots": shots.table(for_shots) if for_shots else "",
    }
    for name, text in tables.items():
        page = experiment.between(page, (f"<!-- captioners: {name} -->", "<!-- /captioners -->"), text)
    return page


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the experiment; returns whether every claim holds."""
    parser = experiment.parser_of(NAME, __doc__, seeds=[0], scenes=1000)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument(
        "--write-docs", action="store_true", help="only write the tables of docs/captioners.md"
    )
    args = parser.parse_args(arguments)
    folder = experiment.folder_of(NAME, args)
    if not args.write_docs:
        for seed in args.seeds:
            for system in args.systems:
                print(f"{TITLES[system]}, seed {seed}", flush=True)
                found = run(system, seed, args.out, 8 if args.quick else args.scenes, args.quick)
                file = folder / f"{system}-seed-{seed}.json"
                experiment.write_result(file, {**experiment.origin(NAME, arguments), **found})
    results = experiment.stored(folder, "*-seed-*.json")
    if args.write_docs:
        write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), results))
    held = experiment.show(verdict(results))
    print(f"{table(results)}\nResults: {folder}")
    return held


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
