"""VisualBERT: outputs, losses and every gradient of transformers' VisualBert classes; packing, inputs."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from tests.parity import close, needs, randomize
from vlmkernels.models._visualbert_sources import CLASSES, TIED
from vlmkernels.models.parts import padding
from vlmkernels.models.parts.image_grid import ImageGrid, pool_boxes
from vlmkernels.models.visualbert import CONFIGS, HEADS, VisualBERT, VisualBertConfig

B, L, V, E, A = 3, 9, 4, 10, 7  # texts, tokens, regions, their width, answers
TINY = VisualBertConfig(
    head="none", answers=A, visual_dim=E, vocab_size=61, context_length=12, max_positions=20, width=24,
    layers=2, heads=3, mlp_width=40, dropout=0.0, pad_id=1, region_type=1,
)  # fmt: skip


def peer_class(head: str):
    name = {head: name for name, head in CLASSES.items()}[head]
    return getattr(peers.load("transformers"), name)


def build_peer(head: str, **changes):
    transformers = peers.load("transformers")
    sizes = {
        "vocab_size": 61, "hidden_size": 24, "visual_embedding_dim": E, "num_hidden_layers": 2,
        "num_attention_heads": 3, "intermediate_size": 40, "max_position_embeddings": 20,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    labels = {"num_labels": A} if head == "vqa" else {}
    return peer_class(head)(transformers.VisualBertConfig(**{**sizes, **labels, **changes})).eval()


@functools.cache
def pair(head: str):
    """The peer with random weights in float64, and ours with the same."""
    torch.manual_seed(HEADS.index(head))
    peer = randomize(build_peer(head))
    return peer, ours_of(peer)


def ours_of(peer, match_label: int = 0) -> VisualBERT:
    model = VisualBERT.from_hf_state_dict(peer.state_dict(), heads=3, pad_id=1, match_label=match_label)
    return model.double()


def batch(head: str = "none", seed: int = 0) -> dict[str, Tensor]:
    """Texts and regions of different lengths, with everything given; as transformers names it."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    lead = (B, 2) if head == "vcr" else (B,)
    lengths, counts = integers(L - 4, *lead, 1) + 4, integers(V, *lead, 1) + 1
    lengths.view(-1)[0] = L
    return {
        "input_ids": integers(61, *lead, L),
        "attention_mask": (torch.arange(L) < lengths).long(),
        "token_type_ids": integers(2, *lead, L),
        "position_ids": integers(20, *lead, L),
        "visual_embeds": torch.randn(*lead, V, E, dtype=torch.float64, generator=generator),
        "visual_attention_mask": (torch.arange(V) < counts).long(),
        "visual_token_type_ids": integers(2, *lead, V),
        "image_text_alignment": integers(L + 1, *lead, V, 3) - 1,
    }


NAMES = {
    "input_ids": "tokens", "attention_mask": "attention_mask", "token_type_ids": "token_types",
    "position_ids": "positions", "visual_embeds": "regions", "visual_attention_mask": "region_mask",
    "visual_token_type_ids": "region_types", "image_text_alignment": "alignment",
}  # fmt: skip


def as_ours(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {NAMES[name]: x for name, x in inputs.items()}


def labelled(head: str, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the peer and ours take beside the inputs."""
    if head == "pretraining":
        labels = torch.full((B, L + V), -100)
        for row, column, word in ((0, 2, 5), (0, 8, 60), (1, 1, 0), (2, 3, 9)):
            labels[row, column] = word
        sentence = torch.tensor([0, 1, 0])
        return (
            {"labels": labels, "sentence_image_labels": sentence},
            {"labels": labels[:, :L], "match": sentence == 0},
        )
    if head == "vqa":
        answers = torch.rand(B, A, dtype=torch.float64).softmax(-1)
        answers[:, 0] = 0
        return {"labels": answers}, {"labels": answers}
    if head in ("nlvr2", "vcr"):
        classes = torch.tensor([1, 0, 1])
        return {"labels": classes}, {"labels": classes}
    phrases = torch.tensor([[1, 3, -1], [2, L, -1], [0, 1, 2]])
    target = torch.rand(B, 3, V, dtype=torch.float64) * inputs["visual_attention_mask"][:, None]
    target[:, :, 0] += 0.1
    target = target / target.sum(-1, keepdim=True)
    return (
        {"labels": target, "region_to_phrase_position": phrases},
        {"labels": target, "phrases": phrases},
    )


def gradients(model) -> dict[str, Tensor | None]:
    """By our names."""
    inner = ("embeddings.", "encoder.", "pooler.")
    return {
        f"visual_bert.{name}" if name.startswith(inner) else name: p.grad
        for name, p in model.named_parameters()
        if name not in TIED
    }


def assert_gradients(ours, peer) -> None:
    got, want = gradients(ours), gradients(peer)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        if gradient is None:
            assert got[name] is None, name
        else:
            close(got[name], gradient, name, 1e-10)
    assert sum(g is not None and bool(g.any()) for g in want.values()) > 30


@needs("transformers")
@pytest.mark.parametrize("head", [head for head in HEADS if head != "none"])
def test_a_class_of_transformers(head):
    """Outputs, loss and all gradients, those of the regions among them, with every input given."""
    peer, ours = pair(head)
    inputs = batch(head)
    theirs, own = labelled(head, inputs)
    for model in (peer, ours):
        model.zero_grad()
    features = [inputs["visual_embeds"].clone().requires_grad_() for _ in range(2)]
    aligned = inputs["image_text_alignment"].view(-1, V, 3)  # alone is not flattened by that of VCR
    want = peer(**{**inputs, "visual_embeds": features[0], "image_text_alignment": aligned}, **theirs)
    got = ours(**{**as_ours(inputs), "regions": features[1]}, **own)
    close(got["loss"], want.loss, "loss")
    if head == "pretraining":
        close(got["match_logits"], want.seq_relationship_logits, "match_logits")
    elif head == "vqa":
        close(got["logits"].log_softmax(-1), want.logits, "logits")
    else:
        close(got["logits"], want.logits, "logits")
    for loss in (want.loss, got["loss"]):
        loss.backward()
    close(features[1].grad, features[0].grad, "gradient of the regions")
    assert_gradients(ours, peer)


@needs("transformers")
def test_the_model_of_transformers():
    """Hidden states of all positions, padding included, and the pooled [CLS]."""
    peer, ours = pair("none")
    inputs = batch()
    want, got = peer(**inputs), ours(**as_ours(inputs))
    close(got["hidden"], want.last_hidden_state, "hidden")
    close(got["pooled"], want.pooler_output, "pooled")
    for model in (peer, ours):
        model.zero_grad()
    (want.last_hidden_state.sin().sum() + want.pooler_output.sum()).backward()
    (got["hidden"].sin().sum() + got["pooled"].sum()).backward()
    assert_gradients(ours, peer)


@needs("transformers")
@pytest.mark.parametrize(
    "given", [("input_ids",), ("input_ids", "visual_embeds"), ("input_ids", "attention_mask")]
)
def test_defaults_are_those_of_transformers(given):
    peer, ours = pair("none")
    inputs = {name: x for name, x in batch().items() if name in given}
    close(ours(**as_ours(inputs))["hidden"], peer(**inputs).last_hidden_state)


@needs("transformers")
def test_logits_of_words():
    """Those of all positions, or of the labelled tokens in order."""
    peer, ours = pair("pretraining")
    inputs = batch("pretraining")
    theirs, own = labelled("pretraining", inputs)
    want = peer(**inputs).prediction_logits
    close(ours(**as_ours(inputs), return_logits=True)["logits"], want, "all")
    rows = ours(**as_ours(inputs), **own, return_logits=True)["logits"]
    close(rows, want[theirs["labels"] != -100], "masked")


@needs("transformers")
def test_both_polarities_of_the_match():
    """What `match` means in classes depends on match_label alone."""
    peer, _ = pair("pretraining")
    inputs = batch("pretraining")
    match = torch.tensor([True, False, False])
    for label in (0, 1):
        ours = ours_of(peer, label)
        classes = torch.where(match, label, 1 - label)
        theirs, own = labelled("pretraining", inputs)
        want = peer(**inputs, **{**theirs, "sentence_image_labels": classes}).loss
        got = ours(**as_ours(inputs), **{**own, "match": match})
        close(got["loss"], want, f"match_label {label}")
        alone = ours(**as_ours(inputs), match=match)
        close(alone["loss"], got["match_loss"])


def tiny(head: str = "pretraining", **changes) -> VisualBERT:
    torch.manual_seed(0)
    return randomize(VisualBERT(dataclasses.replace(TINY, head=head, **changes)))


def own_batch(head: str = "pretraining"):
    inputs = batch(head)
    return {**as_ours(inputs), **labelled(head, inputs)[1]}


@pytest.mark.parametrize("head", ["pretraining", "nlvr2", "vqa"])
def test_rows_alone_equal_rows_of_all(head, monkeypatch):
    """Without padding, in the last layer only what a head reads: the same loss and the same gradients."""
    model, inputs, results = tiny(head), own_batch(head), []
    for packs in (True, False):
        monkeypatch.setattr(padding, "can_drop", lambda x, packs=packs: packs)
        model.zero_grad()
        loss = model(**inputs)["loss"]
        loss.backward()
        results.append(
            {"loss": loss.detach(), **{n: g for n, g in gradients(model).items() if g is not None}}
        )
    assert results[0].keys() == results[1].keys()
    for name, wanted in results[1].items():
        close(results[0][name], wanted, name)


def test_a_label_at_padding_counts():
    model, inputs = tiny(), own_batch()
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    inputs["attention_mask"][0, 5:] = 0
    inputs["labels"][0, 7] = 3
    logits = model(**{**inputs, "labels": None, "match": None}, return_logits=True)["logits"][:, :L]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
    close(model(**inputs)["masked_lm_loss"], want)


def test_no_masked_token_is_a_loss_of_zero_with_gradients():
    model, inputs = tiny(), own_batch()
    out = model(**{**inputs, "labels": torch.full((B, L), -100)})
    assert out["masked_lm_loss"] == 0
    out["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_texts_of_a_question_of_one_token():
    """The row two before the end of a text that has none is its first."""
    model = tiny("vqa")
    tokens, mask = torch.full((2, 5), 7), torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    logits = model(tokens, attention_mask=mask)["logits"]
    alone = model(tokens[:1], attention_mask=torch.tensor([[1, 1, 0, 0, 0]]) * mask[:1])["logits"]
    close(logits[:1], alone)


def test_regions_of_an_image_serve_all_its_texts():
    model, inputs = tiny("vcr"), batch("vcr")
    once = as_ours(
        {name: x[:, 0] if "visual" in name or "align" in name else x for name, x in inputs.items()}
    )
    each = {
        n: x[:, None].expand(-1, 2, *x.shape[1:]) if "reg" in n or "align" in n else x
        for n, x in once.items()
    }
    close(model(**once)["logits"], model(**each)["logits"])


@pytest.mark.parametrize("head", HEADS)
def test_unused_weights_wait_for_no_gradient(head):
    model = tiny(head)
    inputs = as_ours(batch(head)) if head == "none" else own_batch(head)
    out = model(**inputs)
    (out["loss"] if head != "none" else out["hidden"].sum() + out["pooled"].sum()).backward()
    assert [name for name, p in model.named_parameters() if (p.grad is None) == p.requires_grad] == []


def test_an_empty_batch():
    """Of a process without samples: a loss of zero, with gradients."""
    model = tiny()
    none = torch.zeros(0, 5, dtype=torch.int64)
    out = model(none, torch.zeros(0, 3, E, dtype=torch.float64), none, match=torch.zeros(0, dtype=torch.bool))
    assert out["loss"] == 0
    assert out["match_logits"].shape == (0, 2)
    out["loss"].backward()


def test_dropout_acts_in_training_only():
    model, inputs = tiny(dropout=0.5), own_batch()
    model.eval()
    close(model(**inputs)["loss"], tiny()(**inputs)["loss"])
    model.train()
    assert len({model(**inputs)["loss"].item() for _ in range(3)}) == 3


# The image tower


def test_boxes_are_means_of_the_map():
    """Against sums written out: interpolation at the centres of equal parts of each box."""
    torch.manual_seed(0)
    features = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    boxes = torch.tensor(
        [[[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 1.0, 1.0]], [[0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 1.0, 0.3]]]
    )
    got = pool_boxes(features, boxes.double(), points=2)
    want = torch.zeros(2, 2, 3, dtype=torch.float64)
    for b in range(2):
        for v, (left, top, right, bottom) in enumerate(boxes[b].tolist()):
            for i in range(2):
                for j in range(2):
                    x = 6 * (left + (j + 0.5) / 2 * (right - left)) - 0.5
                    y = 4 * (top + (i + 0.5) / 2 * (bottom - top)) - 0.5
                    x, y = min(max(x, 0), 5), min(max(y, 0), 3)
                    x0, y0 = min(int(x), 4), min(int(y), 2)
                    fx, fy = x - x0, y - y0
                    corner = features[b, :, y0 : y0 + 2, x0 : x0 + 2]
                    weight = torch.tensor([[(1 - fy) * (1 - fx), (1 - fy) * fx], [fy * (1 - fx), fy * fx]])
                    want[b, v] += (corner * weight.double()).sum((1, 2)) / 4
    close(got, want, "boxes", 1e-6)


def test_a_box_of_one_point_is_a_cell_of_the_grid():
    torch.manual_seed(0)
    tower = ImageGrid(32, (1, 1), 4, pool=False).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    cells = tower(images)
    assert cells.shape == (2, 64, 32)
    at = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    y, x = torch.meshgrid(at, at, indexing="ij")
    boxes = torch.stack([x, y, x, y], -1).view(1, 64, 4).expand(2, -1, -1)
    close(tower(images, boxes), cells)


def test_images_are_regions_of_the_tower():
    model = tiny(image_size=16, conv_blocks=(1, 1), conv_width=4, conv_pool=False).eval()
    images, tokens = torch.randn(B, 3, 16, 16, dtype=torch.float64), batch()["input_ids"]
    boxes = torch.rand(B, 5, 4, dtype=torch.float64)
    for given in ({}, {"boxes": boxes}):
        got = model(tokens, images=images, match=torch.ones(B, dtype=torch.bool), **given)
        regions = model.encode_image(images, **given)
        close(got["match_logits"], model(tokens, regions)["match_logits"])
    got["loss"].backward()
    assert model.tower.position.grad.any()


# Invalid input


@pytest.mark.parametrize(
    ("head", "changes", "message"),
    [
        ("pretraining", {"tokens": torch.zeros(B, L)}, r"tokens must be integer ids \[B, L\], got torch"),
        ("pretraining", {"tokens": torch.zeros(B, 21).long()}, "1 to max_positions 20 columns, got 21"),
        ("pretraining", {"regions": torch.zeros(B, V, E + 1)}, r"regions must be floating \[B = 3, V, 10\]"),
        (
            "pretraining",
            {"region_mask": torch.ones(B, V + 1), "token_types": torch.zeros(B, L)},
            r"token_types must be integer \[3, 9\], got torch.float32 .*; region_mask must be mask \[3, 4\]",
        ),
        ("pretraining", {"regions": None}, "region_mask may only be given with regions; region_types may"),
        ("pretraining", {"alignment": torch.zeros(B, V)}, r"alignment must be integer \[3, 4, A\]"),
        ("pretraining", {"labels": torch.zeros(B, L + V).long()}, r"labels must be int64 \[3, 9\] for the"),
        ("pretraining", {"match": torch.zeros(B)}, r"match must be bool \[B = 3\], got torch.float32"),
        ("pretraining", {"phrases": torch.zeros(B, 1).long()}, "phrases may only be given for the head phr"),
        ("pretraining", {"images": torch.zeros(B, 3, 8, 8)}, "images or regions must be given, got both"),
        ("vqa", {"labels": torch.zeros(B).long()}, r"labels must be floating \[3, 7\] for the head vqa"),
        ("vqa", {"match": torch.ones(B, dtype=torch.bool)}, "match may only be given for the head pretrain"),
        ("phrases", {"phrases": None}, r"phrases must be int64 \[B = 3, P\], got None"),
        ("phrases", {"phrases": torch.full((B, 3), L + V)}, "phrases must be positions up to 12, or -1"),
        ("nlvr2", {"boxes": torch.zeros(B, V, 4)}, "boxes may only be given with images"),
        ("vcr", {"tokens": torch.zeros(B, L).long()}, r"tokens must be integer ids \[B, C, L\] for the head"),
    ],
)  # fmt: skip
def test_invalid_inputs(head, changes, message):
    inputs = own_batch(head)
    if head == "vcr":
        inputs = {"tokens": changes["tokens"]}
    with pytest.raises(ValueError, match=message):
        tiny(head)(**{**inputs, **changes})


def test_images_need_a_tower():
    tokens = batch()["input_ids"]
    with pytest.raises(ValueError, match=r"no image tower \(conv_blocks\); pass regions"):
        tiny()(tokens, images=torch.zeros(B, 3, 16, 16))
    model = tiny(image_size=16, conv_blocks=(1,), conv_width=4)
    with pytest.raises(
        ValueError, match=r"images must be floating \[B, 3, 16, 16\].*boxes must be \[B = 3, V, 4\]"
    ):
        model.encode_image(torch.zeros(B, 3, 8, 8), torch.zeros(B, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "itm"}, "head must be one of pretraining, vqa, .*, got 'itm'"),
        (
            {"match_label": 2, "region_type": 2},
            r"match_label must be 0 or 1, got 2; region_type must be a type below",
        ),
        ({"conv_blocks": (1, 1), "image_size": 30}, "image_size must be a multiple of 8, got 30"),
        ({"width": 100}, "heads must be a divisor of width 100, got 12"),
        ({"context_length": 600}, r"context_length must be in \[2, max_positions\], got 600 and 512"),
        ({"dropout": 1.0, "eps": -1.0, "activation": "mish"}, "activation must .* eps must .* dropout must"),
        ({"layers": 0, "visual_dim": 0}, "visual_dim must be at least 1, got 0; layers must be at least 1"),
        ({"pad_id": -1}, "pad_id must be an id below 30522, got -1"),
    ],
)
def test_invalid_configs(fields, message):
    with pytest.raises(ValueError, match=f"VisualBertConfig: .*{message}"):
        VisualBertConfig(**fields)


def test_the_published_size_has_the_published_parameters():
    with torch.device("meta"):
        model = VisualBERT(CONFIGS["visualbert-vqa"])
    count = sum(p.numel() for name, p in model.named_parameters() if name.startswith("visual_bert"))
    assert round(count / 1e6, 1) == 111.5
