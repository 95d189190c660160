"""int8 keys against their float32 originals, on features of a trained encoder."""

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import int8_experiment as experiment
from vlmkernels.data import load_emoji3
from vlmkernels.models.parts.packaged import missing_packages


def test_quantized_keys_are_within_half_a_step_and_zeros_stay_zero():
    key = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    key[3] = 0
    small, scale = experiment.quantized(key)
    assert small.dtype == torch.int8
    assert small.abs().amax(1).tolist() == [127 if i != 3 else 0 for i in range(20)]
    assert ((small * scale[:, None] - key).abs() <= scale[:, None] * 0.5001).all()


def test_agreement_counts_what_the_rounding_changes():
    """Keys that differ by less than a step are ordered by their indices, until they are rescored."""
    steps = torch.arange(30.0)
    key = torch.stack([torch.ones(30), 1e-5 * steps], 1)
    found = experiment.agreement(torch.tensor([[0.0, 1.0], [0.0, -1.0]]), key, 10)
    assert found["int8"]["same set"] == 0.5
    assert found["int8"]["overlap"] == 0.5
    query = torch.tensor([[0.0, -1.0]])
    assert experiment.agreement(query, key, 10)["rescored"] == {
        "same set": 1.0,
        "same first": 1.0,
        "overlap": 1.0,
    }


@pytest.mark.skipif(bool(missing_packages()), reason="the packages of the extra asif are not installed")
def test_rescored_int8_keys_find_the_ten_of_float32_on_real_embeddings():
    from vlmkernels.use.encoders import MINILM, text_encoder

    encoder = text_encoder(MINILM, device="cpu")
    concepts = load_emoji3().concepts[::8]
    key = F.normalize(encoder([concept.label for concept in concepts]))
    query = F.normalize(encoder([", ".join(concept.tags) for concept in concepts[::4]]))
    found = experiment.agreement(query, key)
    assert (found["queries"], found["keys"], found["width"]) == (58, 232, 384)
    assert found["rescored"] == {"same set": 1.0, "same first": 1.0, "overlap": 1.0}
    assert found["int8"]["overlap"] > 0.97


def test_the_table_goes_between_its_markers():
    row = {"same set": 0.5, "same first": 0.75, "overlap": 0.875}
    found = {"queries": 1852, "keys": 3704, "width": 8, "int8": row, "rescored": row}
    text = experiment.table({"names": found})
    assert "| 1,852, 3,704, 8 | int8 keys | 50.00 % | 75.00 % | 87.50 % |" in text
    page = experiment.with_table(f"before\n{experiment.MARKS[0]}\nold\n{experiment.MARKS[1]}\nafter", text)
    assert "old" not in page
    assert page.startswith("before\n")
    assert page.endswith("\nafter")
    with pytest.raises(ValueError, match="must have the marker"):
        experiment.with_table("no marker", text)


def test_the_page_of_the_op_has_the_stored_table():
    page = experiment.PAGE.read_text(encoding="utf-8")
    stored = json.loads(experiment.RESULTS.read_text(encoding="utf-8"))
    assert experiment.table(stored["sets"]) in page
