"""The benchmarks of whole models: who is compared, what is refused, what is written."""

import json
import math

import pytest
import torch

from benchmarks import peers
from benchmarks.models import __main__ as command
from benchmarks.models import page, work
from benchmarks.models.systems import BATCHES, CONFIGS, Family, Model, System

pytestmark = pytest.mark.skipif(
    any(peers.why_not(name) for name in ("open_clip", "transformers")),
    reason="open_clip and transformers are what is compared",
)
STEP = work.Work("CLIP tiny", "training step", 2, "fp32")


def linear_model(weight: float) -> Model:
    module = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.constant_(module.weight, weight)
    embed = lambda x: module(x.float())  # noqa: E731
    return Model(module, lambda images, tokens: embed(images).sum(), embed, embed)


def line_of(*systems: System, kind=STEP) -> dict:
    inputs = lambda batch: (torch.ones(batch, 3), torch.ones(batch, 3))  # noqa: E731
    family = Family("CLIP tiny", systems, inputs, "peer", BATCHES)
    options = command.argparse.Namespace(quick=True, seconds=0.1, no_memory=True, threads=1)
    return command.measured(kind, family, systems, options)


def test_every_system_of_a_line_is_timed_and_agrees(capsys, tmp_path):
    status = command.main(
        ["--quick", "--work", "CLIP.*step.*fp32", "--no-memory", "--results", str(tmp_path)]
    )
    said = capsys.readouterr().out
    assert status == 0
    assert "not measured" not in said
    for name in ("**vlmkernels**", "open_clip", "transformers", "transformers, patched"):
        assert f"{name}  " in said
    assert "optimizer step of open_clip" in said
    assert not list(tmp_path.iterdir())  # quick runs are not kept


def test_only_the_named_peers_run_beside_ours(capsys):
    assert (
        command.main(["--quick", "--work", "CLIP.*texts.*fp32", "--no-memory", "--systems", "patched"]) == 0
    )
    said = capsys.readouterr().out
    assert "**vlmkernels**" in said
    assert "transformers, patched  " in said
    assert "open_clip  " not in said
    assert "transformers  " not in said


def test_captions_come_as_each_tokenizer_pads_them():
    family = next(f for f in work.families(True) if f.name == "CLIP tiny on captions")
    _, tokens = family.inputs(64)
    config = CONFIGS["emoji-tiny"]
    lengths = (tokens == config.eot_id).int().argmax(1) + 1
    assert tokens.shape == (64, config.context_length)
    assert 9 <= lengths.min() < lengths.max() <= 31
    assert 12 < lengths.float().mean() < 15
    assert tokens.masked_fill(torch.arange(config.context_length) < lengths[:, None], 0).eq(0).all()
    padded = {system.name: system.model().padded(tokens).shape[1] for system in family.systems}
    assert padded["vlmkernels"] == padded["open_clip"] == config.context_length
    assert padded["transformers"] == padded["transformers, compiled"] == lengths.max()


@pytest.mark.slow
def test_all_tiny_works(capsys):
    assert command.main(["--quick"]) == 0
    assert "not measured" not in capsys.readouterr().out


def test_a_peer_that_computes_something_else_is_not_timed():
    line = line_of(System("vlmkernels", lambda: linear_model(1.0)), System("peer", lambda: linear_model(1.1)))
    ours, peer = line["rows"]
    assert "differs from ours by 1.0e-01" in peer["why_not"]
    assert "ratio" not in peer
    assert ours["seconds"]["median"] > 0


def test_what_stops_a_peer_is_its_reason():
    def missing():
        raise ImportError("no such peer")

    line = line_of(System("vlmkernels", lambda: linear_model(1.0)), System("peer", missing))
    assert line["rows"][1]["why_not"] == "ImportError: no such peer"


def test_flops_and_parts_of_a_step():
    """Of y = x W^T, [2, 3] by [3, 3]: the product, and two like it for a backward."""
    line = line_of(System("vlmkernels", lambda: linear_model(1.0)), System("peer", lambda: linear_model(1.0)))
    assert line["flops"] == 3 * (2 * 2 * 3 * 3)
    assert line["rows"][1]["ratio"]["median"] > 0
    assert set(line["parts"]) == {"vlmkernels", "peer"}
    assert line["parts"]["peer"]["linear layers"] > 0


def test_families_read_the_same_and_start_equal():
    for family in work.families(quick=True):
        images, tokens = family.inputs(2)
        with torch.no_grad():
            losses = [s.model().loss(images, tokens) for s in family.systems if not s.compiled]
        alone = family.name.startswith(("Flamingo", "SimVLM"))
        assert len(losses) >= (1 if alone else 3)
        for loss in losses:
            assert math.isclose(loss, losses[0], rel_tol=1e-4), family.name


def test_results_are_merged_and_written_whole(tmp_path):
    path = tmp_path / "machine.json"
    names = [x.name for x in work.works(False)][:2]
    row = {"name": "vlmkernels", "seconds": {"median": 1.5}, "extra_bytes": 3 << 20}
    peer = {"name": "open_clip", "seconds": {"median": 3.0}, "ratio": {"median": 2, "p20": 1.9, "p80": 2.1}}
    line = {"of_limit": 0.5, "parts": {"vlmkernels": {"attention": 0.25}}, "optimizer": {}}
    for i, name in enumerate(reversed(names)):
        header = {
            "id": str(i), "command": "c", "date": "d", "commit": "0" * 40, "dirty": False, "cpu": "cpu",
            "isa": "isa", "threads": 2, "load": [0.0], "versions": {}, "kernels": {}, "limits": {},
            "tests": {},
        }  # fmt: skip
        command._store(path, "machine", header, {**line, "name": name, "rows": [row, peer]})
    stored = json.loads(path.read_text())
    assert [x["name"] for x in stored["lines"]] == names  # in the order of the works
    assert set(stored["runs"]) == {"0", "1"}
    text = page.render([stored])
    assert f"| {names[0]} | **vlmkernels** | 1.5 s | 1 | 3 MiB | 50% |" in text
    assert "|  | open_clip | 3 s | 2.00 (1.90–2.10) | – |  |" in text
    assert "- vlmkernels: attention 250 ms" in text


def test_the_page_is_that_of_the_stored_results():
    results = [json.loads(path.read_text()) for path in sorted(command.RESULTS.glob("*.json"))]
    stale = "run python -m benchmarks.models --write-docs"
    assert page.PAGE.read_text() == page.render(results), stale
    assert page.HEADLINE.findall(page.README.read_text()) == [page.headline(results)], stale
