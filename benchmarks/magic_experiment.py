"""Do captions fit their pictures better with MAGIC's guidance than without?

    VLMKERNELS_PHOTOS=FOLDER python -m benchmarks.magic_experiment    photographs
    python -m benchmarks.magic_experiment                             scenes of emoji
    python -m benchmarks.magic_experiment --seeds 0 1 2               language models of three seeds
    python -m benchmarks.magic_experiment --quick                     to try the script; numbers mean nothing

For each seed a language model learns captions, without any picture, as the configuration lm-captions says.
Photographs are those of FOLDER (annotations.json with a file name and captions for each, and captions of
other photographs, one a line, in ../coco_captions.txt); their scorer is ASIF with the encoders that packages
ship and the embedded emoji as anchors, so no model was trained on pairs of photographs and captions. The
scenes are those of the test, their scorer a CLIP trained as clip-scenes says.

Every picture is captioned without guidance (beta = 0), with it, and guided by another picture. Judged are the
scorer's own score of the caption with the picture, a cosine, and content-word precision: the share of the
caption's words, but for stop words, that occur in a reference caption of the picture. Differences are tested
per picture, each the mean over the seeds. alpha, beta, k are the paper's; nothing is tuned on the pictures.
Trainings and captions that are in --out are not made again.

Results are in benchmarks/results/magic/, a file for each seed; the table is made of all that are there.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from benchmarks import experiment
from benchmarks.experiment import once, train_part
from benchmarks.paired import Comparison, compare
from vlmkernels._files import write_text
from vlmkernels.data import load_scenes, read_image
from vlmkernels.use.caption_scores import plain_tokens
from vlmkernels.use.magic import Judge, load_judge, load_writer, write_guided

NAME = "magic"
RESULTS = experiment.results_folder(NAME)
CONFIG = "lm-captions"
PHOTOS, SCENES = "photographs", "scenes"
CAPTIONS = "coco_captions.txt"
ROWS = {
    "alone": "without guidance",
    "guided": "guided by the picture",
    "other": "guided by another picture",
}
MEASURES = {"score": "scorer's score", "precision": "content-word precision"}
STOP = (
    "a an and are as at be by for from had has have he her his in into is it its of off on onto or out over "
    "she some that the their them there they this to up was were what which while who with"
)
STOP_WORDS = frozenset(STOP.split())
BATCH = 36  # pictures at once: they share the texts that are scored
STEPS = 600  # of the language model of photographs, four fifths of a pass over the captions


class Picture(NamedTuple):
    name: str
    image: Image.Image
    references: list[str]


def photographs(folder: Path, limit: int | None) -> list[Picture]:
    """Those that annotations.json lists."""
    listed = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))["images"][:limit]
    return [
        Picture(each["file_name"], read_image(folder / "images" / each["file_name"]), each["captions"])
        for each in listed
    ]


def scenes(limit: int) -> list[Picture]:
    """Test scenes, whose combinations of objects are in no training caption."""
    source = load_scenes("test", size=limit)
    samples = (source[i] for i in range(limit))
    return [Picture(each["key"], each["image"], [each["text"]]) for each in samples]


def content_words(text: str) -> set[str]:
    return set(plain_tokens(text).split()) - STOP_WORDS


def precision(caption: str, references: Sequence[str]) -> float:
    """The share of the caption's content words that a reference has, 0 if it has none."""
    words = content_words(caption)
    known = set().union(*map(content_words, references))
    return len(words & known) / len(words) if words else 0.0


def in_batches(rows: int) -> Iterator[slice]:
    return (slice(at, at + BATCH) for at in range(0, rows, BATCH))


def judge_captions(
    judge: Judge, features: Tensor, pictures: Sequence[Picture], captions: Sequence[str]
) -> list[dict[str, Any]]:
    """For each picture the caption and its measures."""
    scores = [
        score
        for part in in_batches(len(captions))
        for score in judge.scorer.similarity(features[part], [[text] for text in captions[part]])[:, 0]
        .div(judge.scale)
        .tolist()
    ]
    return [
        {
            "picture": picture.name,
            "caption": caption,
            "score": score,
            "precision": precision(caption, picture.references),
        }
        for picture, caption, score in zip(pictures, captions, scores, strict=True)
    ]


def run_seed(setting: str, seed: int, out: Path, pictures: Sequence[Picture], quick: bool) -> dict[str, Any]:
    """Train the language model of a seed, and the scorer of scenes, and caption all pictures in all ways."""
    out = out.absolute()
    language = out / f"lm-{setting}-{seed}"
    data = []
    if setting == PHOTOS:
        captions_file = Path(os.environ["VLMKERNELS_PHOTOS"]).absolute().parent / CAPTIONS
        data = ["--data", f"lines:{captions_file}", *(() if quick else ("--max-steps", str(STEPS)))]
    trained = {"lm": train_once("lm", CONFIG, seed, language, quick, *data)}
    place: str | Path = "asif"
    if setting == SCENES:
        place = out / f"clip-{seed}" / "final"
        trained["clip"] = train_once("clip", "clip-scenes", seed, place.parent, quick)
    writer, judge = load_writer(language / "final", "cpu"), load_judge(place, "cpu")
    prepared = [judge.transform(picture.image) for picture in pictures]
    features = torch.cat([judge.encode(prepared[part]) for part in in_batches(len(prepared))])
    ways = {
        "alone": (features, {"beta": 0.0}),
        "guided": (features, {}),
        "other": (features.roll(1, 0), {}),
    }
    captions = {}
    for row, (seen, options) in ways.items():
        made = out / f"captions-{setting}-{seed}-{row}.json"
        if not made.is_file():
            texts: list[str] = []
            for part in in_batches(len(seen)):
                texts += write_guided(writer, judge, seen[part], **options)
            judged = judge_captions(judge, features, pictures, texts)
            write_text(made, json.dumps(judged) + "\n")
        captions[row] = json.loads(made.read_text(encoding="utf-8"))
    return {"trained": trained, "scale": judge.scale, "captions": captions}


def train_once(kind: str, config: str, seed: int, folder: Path, quick: bool, *flags: str) -> dict[str, Any]:
    """Train a model, unless an earlier call has."""
    return once(folder.with_suffix(".json"), lambda: train_part(kind, config, seed, folder, quick, *flags))


def per_picture(results: Sequence[dict[str, Any]], row: str, measure: str) -> list[float]:
    """The mean over the seeds for each picture."""
    seeds = [[each[measure] for each in result["captions"][row]] for result in results]
    return [statistics.fmean(values) for values in zip(*seeds, strict=True)]


def comparisons(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Comparison]:
    """Guided against the other rows, by each measure."""
    return {
        (measure, row): compare(per_picture(results, "guided", measure), per_picture(results, row, measure))
        for measure in MEASURES
        for row in ("alone", "other")
    }


def verdict(results: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """The claims: higher with guidance, and it is the picture that makes it so; p below 0.05."""
    found = comparisons(results)
    return {
        f"{MEASURES[measure]}: higher than {ROWS[row]}": each.mean > 0 and each.p < 0.05
        for (measure, row), each in found.items()
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: the mean of each measure, of precision also each seed's, and the paired differences."""
    lines = [
        f"| captions | {' | '.join(MEASURES.values())} | different captions |",
        "|---|---|---|---|",
    ]
    for row, title in ROWS.items():
        cells = []
        for measure in MEASURES:
            each = [statistics.fmean(per_picture([result], row, measure)) for result in results]
            seeds = f" ({', '.join(f'{value:.3f}' for value in each)})" if len(each) > 1 else ""
            cells.append(f"{statistics.fmean(each):.3f}{seeds}")
        different = [len({each["caption"] for each in result["captions"][row]}) for result in results]
        cells.append(f"{statistics.fmean(different):.0f} of {len(results[0]['captions'][row])}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| difference per picture | " + " | ".join(MEASURES.values()) + " |", "|---|---|---|"]
    found = comparisons(results)
    for row in ("alone", "other"):
        cells = [str(found[measure, row]) for measure in MEASURES]
        lines.append(f"| {ROWS['guided']} – {ROWS[row]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the experiment; returns whether every claim holds."""
    args = experiment.parser_of(NAME, __doc__, seeds=[0], scenes=200).parse_args(arguments)
    photos = os.environ.get("VLMKERNELS_PHOTOS")
    setting = PHOTOS if photos else SCENES
    if not photos:
        print("VLMKERNELS_PHOTOS is not set to a folder of photographs: scenes of emoji take their place")
    if photos:
        pictures = photographs(Path(photos), 4 if args.quick else None)
    else:
        pictures = scenes(4 if args.quick else args.scenes)
    folder = experiment.folder_of(NAME, args) / setting
    results, _ = experiment.each_seed(
        NAME,
        arguments,
        args,
        lambda seed: {"setting": setting, **run_seed(setting, seed, args.out, pictures, args.quick)},
        folder=folder,
    )
    for row in ("alone", "guided"):
        for each in results[-1]["captions"][row][:5]:
            print(f"  {ROWS[row]}: {each['picture']}: {each['caption']}")
    held = experiment.show(verdict(results))
    print(f"{table(results)}\nResults: {folder}")
    return held


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
