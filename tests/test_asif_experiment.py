"""The experiment with the number of anchors: what it compares, what it claims, and its picture."""

import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from benchmarks import asif_experiment as experiment
from benchmarks import asif_picture, asif_tasks
from benchmarks.asif_tasks import Pairs
from vlmkernels.models import AnchorFolder
from vlmkernels.models.parts.packaged import missing_packages
from vlmkernels.use import asif as use


def latent_pairs(concepts=120, queries=40, noise=0.5):
    """Images and texts that are two projections of what they have in common, two anchors of each concept."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=rng)

    maps = draw(12, 30), draw(12, 20)
    common = draw(concepts + queries, 12)
    numbers = list(range(concepts)) * 2
    anchors = tuple(common[numbers] @ each + noise * draw(2 * concepts, each.shape[1]) for each in maps)
    asked = tuple(common[concepts:] @ each + noise * draw(queries, each.shape[1]) for each in maps)
    return Pairs(anchors, numbers, asked, [f"text {i}" for i in range(queries)])


def test_more_anchors_find_more(monkeypatch):
    """Fails unless the mean recall rises with every doubling of the anchors, and edits are exact."""
    monkeypatch.setattr(asif_tasks, "CONCEPTS", (8, 15, 30, 60))
    pairs = latent_pairs()
    rows = experiment.run_task(pairs)
    assert [row["concepts"] for row in rows] == [8, 15, 30, 60, 120]
    assert [row["anchors"] for row in rows] == [16, 30, 60, 120, 240]
    assert [len(row["image_to_text"]["R@1"]) for row in rows] == [experiment.DRAWS] * 4 + [1]
    results = {"tasks": {"latent": rows}, "edits": {"latent": experiment.edit(pairs)}}
    claims = experiment.verdict(results)
    assert all(claims.values()), claims
    assert results["edits"]["latent"]["largest change"] > 0.01
    means = [sum(row["image_to_text"]["R@1"]) / len(row["image_to_text"]["R@1"]) for row in rows]
    assert means == sorted(means)
    assert means[-1] > 5 * rows[-1]["chance"]["image_to_text"]["R@1"]


def test_shuffled_anchors_find_nothing(monkeypatch):
    """Anchors whose texts are of other images: recall is about that of chance, and the verdict says so."""
    monkeypatch.setattr(asif_tasks, "CONCEPTS", (8, 15, 30, 60))
    pairs = latent_pairs()
    order = torch.randperm(len(pairs.anchors[1]), generator=torch.Generator().manual_seed(1))
    pairs.anchors = pairs.anchors[0], pairs.anchors[1][order]
    rows = experiment.run_task(pairs)
    claims = experiment.verdict({"tasks": {"x": rows}, "edits": {"x": experiment.edit(pairs)}})
    failing = [claim for claim, holds in claims.items() if not holds]
    assert "x: R@5 of all anchors is at least twice chance, both ways" in failing
    assert "x: at least five sizes" not in failing
    assert rows[-1]["image_to_text"]["R@1"][0] < 4 * rows[-1]["chance"]["image_to_text"]["R@1"]


def test_tables_are_between_their_markers():
    page = "a\n<!-- asif: x -->\nold\n<!-- /asif -->\nb\n<!-- asif: y -->\n<!-- /asif -->\nc\n"
    way = {"R@1": [0.1, 0.3], "R@5": [0.5]}
    row = {"concepts": 25, "anchors": 50.0, "image_to_text": way, "text_to_image": way}
    row["chance"] = {name: {"R@1": 0.01, "R@5": 0.05} for name in experiment.WAYS}
    found = experiment.with_tables(page, {"tasks": {"x": [row], "y": [row]}})
    assert found.count("| 25 | 50 | 20.0 % (10.0–30.0) | 50.0 % | 20.0 % (10.0–30.0) | 50.0 % |") == 2
    assert found.count("| chance | | 1.00 % | 5.00 % | 1.00 % | 5.00 % |") == 2
    assert "old" not in found
    assert experiment.with_tables(found, {"tasks": {"x": [row]}}) == found


def test_sets_of_a_draw_are_in_each_other():
    pairs = latent_pairs()
    few, many = (set(pairs.chosen(count, 3).tolist()) for count in (10, 50))
    assert few < many
    assert len(few) == 20
    assert few != set(pairs.chosen(10, 4).tolist())
    assert {i % 120 for i in few} == {i for i in few if i < 120}


def test_the_held_out_are_not_among_the_anchors(monkeypatch, tmp_path):
    """By the names of the default anchors, with features that tell which picture and text they are of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names, captions = [], []
    for split in ("style-train", "style-test"):
        data = asif_tasks.load_emoji3(split)
        names += [f"{style}/{code}" for style, code in zip(data.styles, data.hexcodes, strict=True)]
        captions += data.names
    numbers = torch.arange(len(names), dtype=torch.float64)[:, None].float() + 1
    folder = AnchorFolder.create(tmp_path / "anchors", image_width=1, text_width=1)
    folder.add(numbers, numbers, names, captions)
    monkeypatch.setattr(use, "open_asif", lambda: use.ASIF(None, None, folder))
    (pairs,) = asif_tasks.tasks(None).values()
    shown = [names[int(i) - 1] for i in pairs.anchors[0][:, 0]]
    asked = [names[int(i) - 1] for i in pairs.queries[0][:, 0]]
    assert (len(shown), len(asked)) == (2 * 1482, 370)
    assert {name.split("/")[0] for name in shown} == {"noto", "twemoji"}
    assert {name.split("/")[0] for name in asked} == {"fluent"}
    assert not {name.split("/")[1] for name in shown} & {name.split("/")[1] for name in asked}
    assert pairs.texts == [captions[int(i) - 1] for i in pairs.queries[0][:, 0]]
    assert pairs.sizes() == [25, 50, 100, 200, 400, 800, 1482]


def test_picture_is_well_formed():
    curves = [
        asif_picture.Curve("a < b", [10, 100, 3000], [[1.0, 3.0], [10.0], [30.0]], 2.0),
        asif_picture.Curve("photographs", [20, 200, 5000], [[5.0], [20.0], [40.0]], 14.0),
    ]
    root = ET.fromstring(asif_picture.draw("R@5 & more", "anchors", curves))
    lines = root.findall("{*}polyline")
    assert len(lines) == 2
    assert len(root.findall("{*}circle")) == 7
    texts = [each.text for each in root.findall("{*}text")]
    assert {"R@5 & more", "anchors", "a < b", "photographs", "1,000"} <= set(texts)
    points = [tuple(map(float, point.split(","))) for point in lines[1].get("points").split()]
    assert points == sorted(points)
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)


def test_committed_results_hold_and_are_those_of_the_docs():
    results = experiment.json.loads(experiment.RESULTS.read_text(encoding="utf-8"))
    claims = experiment.verdict(results)
    assert all(claims.values()), claims
    assert set(results["tasks"]) == {"emoji", "photos"}
    docs = (experiment.ROOT / "docs" / "asif.md").read_text(encoding="utf-8")
    assert experiment.with_tables(docs, results) == docs
    assert experiment.picture(results) == experiment.PICTURE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_packages()), reason="the extra asif is not installed")
def test_photographs_and_their_captions(tmp_path):
    """Real photographs, through the first 400 emoji in one style: at least twice what chance finds."""
    given = os.environ.get("VLMKERNELS_PHOTOS")
    if not given:
        pytest.skip("VLMKERNELS_PHOTOS is not set to a folder with photographs and their annotations.json")
    encoders = use.Encoders.of(device="cpu")
    emoji = asif_tasks.load_emoji3("style-train")
    anchors = encoders.image(emoji[i]["image"] for i in range(400)), encoders.text(emoji.names[:400])
    pairs = asif_tasks.photographs(Path(given), encoders.image, encoders.text, anchors, range(400))
    found = experiment.judge(pairs, torch.arange(400))
    assert found["image_to_text"]["R@5"] > 2 * found["image_to_text"]["chance"]["R@5"]
