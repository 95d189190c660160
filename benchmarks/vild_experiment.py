"""Does a detector find classes that had no boxes in training, because a teacher's embeddings are distilled?

    python -m benchmarks.vild_experiment               seeds 0, 1, 2
    python -m benchmarks.vild_experiment --seeds 0     one seed
    python -m benchmarks.vild_experiment --quick       to try the script; numbers mean nothing
    python -m benchmarks.vild_experiment --write-docs  only the tables of docs/vild.md, from stored results

One CLIP teaches all: `clip-emoji` of seed 0, trained on with objects cut from other pictures, novel ones too,
and their names. For each seed `vlmkernels train vild --config vild-composites` is run in the variant `text`,
by boxes of base classes alone, and in the distilled one, on the same pictures for as many steps. The latter
also learns from proposals of the detector `text` of seed 0 with the teacher's embeddings of their crops,
written once (`vlmkernels propose`). Both are judged on the test pictures, which have boxes of all classes,
and the distilled one again while every class has the embedding of another class's name. A part whose result
is in --out is not repeated. Results are kept in benchmarks/results/vild/, a file for each seed, and the table
is made of all that are there.

With VLMKERNELS_PHOTOS, a folder of photographs with annotations.json (boxes by names of categories), the
detector of each seed also looks for these categories.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import experiment
from benchmarks.experiment import Result, once, train_part
from vlmkernels._files import write_text
from vlmkernels.data.coco import CocoPictures
from vlmkernels.data.composites import load_composites
from vlmkernels.models._vild_teacher import WIDER
from vlmkernels.models.parts.boxes import clip
from vlmkernels.models.vild import crop_embeddings, text_embeddings
from vlmkernels.train import kinds
from vlmkernels.use.bundle import inference, load_model
from vlmkernels.use.detect import propose
from vlmkernels.use.detection_scores import evaluate_detection
from vlmkernels.use.encoders import image_encoder, text_encoder
from vlmkernels.use.evaluate import evaluate

NAME = "vild"
CONFIG = "vild-composites"
PAGE = experiment.ROOT / "docs" / "vild.md"
TEXT, DISTILLED, SHUFFLED = "text", "ensemble", "shuffled"
ROWS = {
    TEXT: "boxes alone (`text`)",
    DISTILLED: "and the teacher (`ensemble`)",
    SHUFFLED: "and the teacher, names shuffled",
}
PICTURES, PICTURES_SEED = 1000, 0  # of vild-composites
FEW = 16  # pictures of a quick run
PROPOSALS = 16  # of a picture
PROPOSER = 0  # the seed of the detector whose proposals all learn from
CROPPED = 1200  # pictures whose objects the teacher sees
TEACHING = {"epochs": 4, "batch-size": 64, "lr": 5e-4, "data-options": "{}"}
GROUPS = ("base", "novel")


def train(name: str, seed: int, out: Path, quick: bool, *flags: str) -> Result:
    """One training of a ViLD of the variant ``name``, unless an earlier call has made it."""
    folder = out / f"{name}-{seed}"
    flags = ("--clip", str(out / "teacher" / "final"), "--model-options", f"{{variant: {name}}}", *flags)
    if quick:
        flags += ("--data-options", f"{{size: {FEW}, seed: {PICTURES_SEED}}}")
    return once(folder.with_suffix(".json"), lambda: train_part("vild", CONFIG, seed, folder, quick, *flags))


def teach(out: Path, quick: bool) -> Result:
    """Train the teacher; the share of the objects in test pictures whose crops it gives their names."""
    first, folder = out / "emoji", out / "teacher"

    def recognise(of: Path) -> Result:
        return {"recognised": recognised(of / "final", test_pictures(quick))}

    def whole() -> Result:
        return {**train_part("clip", "clip-emoji", 0, first, quick), **recognise(first)}

    def crops() -> Result:
        table = write_crops(out / "crops", 8 if quick else CROPPED)
        flags = [word for name, value in TEACHING.items() for word in (f"--{name}", str(value))]
        flags += ["--init", str(first / "final"), "--data", str(table)]
        return {**train_part("clip", "clip-emoji", 0, folder, quick, *flags), **recognise(folder)}

    parts = {
        "whole": once(first.with_suffix(".json"), whole),
        "crops": once(folder.with_suffix(".json"), crops),
    }
    return {**parts, "cpu_seconds": sum(part["cpu_seconds"] for part in parts.values())}


def write_crops(folder: Path, pictures: int) -> Path:
    """Objects of all classes with some of what is around them, and their names: a table of pairs.

    They are cut from pictures of which no detector sees any.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = load_composites("train", size=pictures, seed=1)
    rng, rows = random.Random(0), ["filepath\ttitle"]
    for index in range(pictures):
        picture, names = data.picture(index)
        centre = (picture.boxes[:, :2] + picture.boxes[:, 2:]) / 2
        half = (picture.boxes[:, 2:] - picture.boxes[:, :2]) / 2
        for place, name in enumerate(names):
            side = half[place] * rng.uniform(1, WIDER)
            box = clip(torch.cat([centre[place] - side, centre[place] + side]), picture.image.shape[1:])
            file = f"{index}-{place}.png"
            picture.to_pil().crop(box.round().int().tolist()).save(folder / file)
            rows.append(f"{file}\t{name}")
    write_text(folder / "pairs.tsv", "\n".join(rows) + "\n")
    return folder / "pairs.tsv"


def test_pictures(quick: bool) -> Any:
    """The test pictures, with boxes of all classes."""
    return load_composites("test", size=8 if quick else None)


def recognised(teacher: Path, data: Any) -> dict[str, float]:
    """Of the objects of base and of novel classes, the share whose crops get their names."""
    images, texts = image_encoder(teacher, device="cpu"), text_encoder(teacher, device="cpu")
    names = text_embeddings(texts, data.names, ["{}"])
    right: dict[str, list[bool]] = {group: [] for group in GROUPS}
    for index in range(len(data)):
        picture, _ = data.picture(index)
        nearest = (crop_embeddings(images, picture.to_pil(), picture.boxes) @ names.T).argmax(1)
        for label, found in zip((picture.labels - 1).tolist(), nearest.tolist(), strict=True):
            right[GROUPS[label >= len(data.base)]].append(label == found)
    return {group: statistics.fmean(each) if each else 0.0 for group, each in right.items()}


def proposals(out: Path, quick: bool) -> Result:
    """Write the proposals of a detector that learned boxes alone; how many, and what they took."""
    train(TEXT, PROPOSER, out, quick)

    def make() -> Result:
        start = time.process_time()
        data = load_composites("train", size=FEW if quick else PICTURES, seed=PICTURES_SEED)
        folder = out / f"{TEXT}-{PROPOSER}" / "final"
        done = propose(folder, data, proposals_file(out), most=PROPOSALS, device="cpu")
        taken = time.process_time() - start
        return {"cpu_seconds": taken, "images": done.images, "proposals": done.proposals}

    return once(out / "proposals.json", make)


def proposals_file(out: Path) -> Path:
    """Where the proposals are kept."""
    return out / "proposals.safetensors"


def other_places(count: int, seed: int) -> Tensor:  # [count] int64
    """A random order in which nothing is at its own place."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    places = torch.empty_like(order)
    places[order] = order.roll(1)
    return places


def judge_shuffled(folder: Path, data: Any, seed: int) -> Result:
    """The scores of a detector that is given each class by the embedding of another one's name."""
    model, tokenizer, _ = load_model(folder, "cpu", fitting=kinds.detectors())
    detector: Any = kinds.of_model(model).detector(model, tokenizer)
    known = detector.classes(data.names)
    given = known._replace(embeddings=known.embeddings[other_places(len(data.names), seed)])

    def detect(image: Tensor) -> Any:
        found = detector.model.detect([image], given)[0]
        return found._replace(labels=found.labels - 1)

    with inference(model):
        return evaluate_detection(detect, data).to_dict()


def run_seed(seed: int, out: Path, quick: bool) -> Result:
    """Trainings and scores of a seed."""
    out = out.absolute()
    data = test_pictures(quick)

    def judge(name: str) -> Result:
        final = out / f"{name}-{seed}" / "final"
        return once(out / f"{name}-{seed}-scores.json", lambda: evaluate(final, data, device="cpu").to_dict())

    found: Result = {"teacher": teach(out, quick)}
    found[TEXT] = {**train(TEXT, seed, out, quick), "scores": judge(TEXT)}
    found["proposals"] = proposals(out, quick)
    taught = train(DISTILLED, seed, out, quick, "--proposals", str(proposals_file(out)))
    found[DISTILLED] = {**taught, "scores": judge(DISTILLED)}
    final = out / f"{DISTILLED}-{seed}" / "final"
    shuffled = once(out / f"{SHUFFLED}-{seed}-scores.json", lambda: judge_shuffled(final, data, seed))
    found[SHUFFLED] = {"scores": shuffled}
    if photographs := os.environ.get("VLMKERNELS_PHOTOS"):
        found["photographs"] = once(
            out / f"photographs-{seed}.json", lambda: judge_photographs(final, Path(photographs), out, quick)
        )
    return found


def judge_photographs(folder: Path, photographs: Path, out: Path, quick: bool) -> Result:
    """The scores of a detector on photographs, for the categories that are in them."""
    document = json.loads((photographs / "annotations.json").read_text(encoding="utf-8"))
    images = document["images"][: 2 if quick else None]
    names = sorted({each["label"] for image in images for each in image["boxes"]})
    boxes = [
        {
            "image_id": image["id"],
            "category_id": names.index(each["label"]),
            "bbox": [
                *each["box"][:2],
                *(high - low for low, high in zip(each["box"], each["box"][2:], strict=False)),
            ],
        }
        for image in images
        for each in image["boxes"]
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    write_text(
        out / "photographs.json",
        json.dumps({"images": images, "annotations": boxes, "categories": categories}),
    )
    data = CocoPictures(out / "photographs.json", images=photographs / "images", base=[])
    return evaluate(folder, data, device="cpu").to_dict()


def scores_of(
    results: Sequence[Result], row: str, group: str, score: str = "AP", kind: str = "box"
) -> list[float]:
    """A score of each seed, in per cent."""
    return [100 * result[row]["scores"][kind][group][score] for result in results]


def verdict(result: Result) -> dict[str, bool]:
    """The claims about a seed: what the teacher knows reaches novel classes, by their names."""
    text, taught, shuffled = (scores_of([result], row, "novel")[0] for row in ROWS)
    return {
        f"novel classes: {taught:.1f} AP, more than {text:.1f} by boxes alone": taught > text,
        f"novel classes: {taught:.1f} AP, more than {shuffled:.1f} with shuffled names": taught > shuffled,
    }


def base_within_spread(results: Sequence[Result]) -> bool | None:
    """Whether the mean AP of base classes loses no more by the teacher than seeds differ; one seed: None."""
    if len(results) < 2:
        return None
    text, taught = (scores_of(results, row, "base") for row in (TEXT, DISTILLED))
    return statistics.fmean(text) - statistics.fmean(taught) <= max(text) - min(text)


def each(values: Sequence[float]) -> str:
    """The mean, and of several seeds each."""
    seeds = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{seeds}"


def minutes(parts: Sequence[Result]) -> list[float]:
    """CPU minutes of each part."""
    return [part["cpu_seconds"] / 60 for part in parts]


def table(results: Sequence[Result]) -> str:
    """Markdown: means over the seeds and each seed; what the trainings took, what the teacher knows."""
    columns = ["AP, all", "base", "novel", "AP50, all", "base", "novel", "mask AP, novel", "CPU minutes"]
    lines = [f"| trained by | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for row, title in ROWS.items():
        cells = [
            each(scores_of(results, row, group, score))
            for score in ("AP", "AP50")
            for group in ("all", *GROUPS)
        ]
        cells.append(each(scores_of(results, row, "novel", kind="mask")))
        trained = [result[row] for result in results if "cpu_seconds" in result[row]]
        cells.append(each(minutes(trained)) if trained else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *remarks(results), measured_on(results)])


def remarks(results: Sequence[Result]) -> list[str]:
    """What the table rests on: data, teacher, proposals; and what was found on photographs."""
    first = results[0]
    teacher, made, scores = first["teacher"], first["proposals"], first[TEXT]["scores"]
    seeds = ", ".join(str(result["seed"]) for result in results)
    classes = " and ".join(f"{scores['classes'][group]} {group}" for group in GROUPS)
    known = " and ".join(f"{100 * teacher['crops']['recognised'][group]:.1f} % ({group})" for group in GROUPS)
    (taken,) = minutes([made])
    told = [
        f"Seeds {seeds}, {first[TEXT]['steps']} steps; {scores['samples']} test pictures, {classes} classes.",
        f"The teacher, once: {minutes([teacher])[0]:.1f} CPU minutes; it names {known} of their crops.",
        f"Proposals, once: {made['proposals']} of {made['images']} pictures, {taken:.1f} CPU minutes.",
    ]
    spread = base_within_spread(results)
    if spread is not None:
        told.append(f"Base classes lose {'no more' if spread else 'more'} by the teacher than seeds differ.")
    seen = [result["photographs"] for result in results if "photographs" in result]
    if seen:
        precision = each([100 * found["box"]["all"]["AP50"] for found in seen])
        boxed = each([100 * found["proposed"] for found in seen])
        counts = f"{seen[0]['samples']} photographs, {seen[0]['objects']} objects"
        told.append(f"On {counts} of {seen[0]['classes']['all']} categories: AP50 {precision}.")
        told.append(f"Of these objects {boxed} % have a box of any category at IoU 0.5.")
    return told


def measured_on(results: Sequence[Result]) -> str:
    """The machines of the results."""
    names = ("processor", "instruction sets", "torch")
    machines = {", ".join(result["machine"][name] for name in names) for result in results}
    return f"Measured on: {'; '.join(sorted(machines))}."


def with_table(page: str, results: Sequence[Result]) -> str:
    """The page with the table between its markers. ValueError if it has not these markers."""
    return experiment.between(page, (f"<!-- {NAME}: table -->", f"<!-- /{NAME} -->"), table(results))


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the experiment; returns whether every claim holds."""
    parser = experiment.parser_of(NAME, __doc__)
    parser.add_argument("--write-docs", action="store_true", help="only write the table of docs/vild.md")
    args = parser.parse_args(arguments)
    results, held = experiment.seeds_or_page(
        NAME,
        arguments,
        args,
        lambda seed: run_seed(seed, args.out, args.quick),
        verdict,
        PAGE,
        with_table,
    )
    print(f"{table(results)}\nResults: {experiment.folder_of(NAME, args)}")
    return held and base_within_spread(results) is not False


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
