"""Flamingo against open_flamingo (logits, loss, gradients, names); with GPT-2 against the layers by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from tests.flamingo_tiny import END, MEDIA, PAD, VISION, WIDTH, inputs, language_model, open_gates
from vlmkernels import intervals
from vlmkernels.models.few_shot import media_labels
from vlmkernels.models.flamingo import Flamingo, FlamingoConfig

needs_open_flamingo = pytest.mark.skipif(
    peers.why_not("open_flamingo.src.flamingo") is not None,
    reason=str(peers.why_not("open_flamingo.src.flamingo")),
)
needs_transformers = pytest.mark.skipif(
    peers.why_not("transformers") is not None, reason=str(peers.why_not("transformers"))
)
PATHS = {
    "gptj": "transformer.h",
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "mpt": "transformer.blocks",
}


def peer_model(kind, every=1, normalized=True):
    """open_flamingo's Flamingo on a tiny open_clip tower; random gates; trained parts need gradients."""
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    vision = {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "image_size": 16}
    torch.manual_seed(7)
    clip = peers.load("open_clip").model.CLIP(16, {**vision, "final_ln_after_pool": not normalized}, text)
    with torch.no_grad():
        clip.visual.ln_post.weight.uniform_(0.5, 1.5)
    clip.visual.output_tokens = True
    language = language_model(kind)
    utils, mixin = peers.load("open_flamingo.src.utils"), peers.load("open_flamingo.src.flamingo_lm")
    utils.extend_instance(language, mixin.FlamingoLMMixin)
    language.set_decoder_layers_attr_name(PATHS[kind])
    build = peers.load("open_flamingo.src.flamingo").Flamingo
    model = build(clip, language, END, MEDIA, vis_dim=24, cross_attn_every_n_layers=every)
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    model.lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    model.lang_encoder.get_input_embeddings().requires_grad_(True)
    return open_gates(model).eval()


def our_model(kind, every=1, normalized=True):
    config = FlamingoConfig(
        MEDIA,
        END,
        vision=VISION,
        language_width=WIDTH,
        cross_attn_every_n_layers=every,
        normalize_patches=normalized,
    )
    return Flamingo(config, lang_encoder=language_model(kind)).eval()


def padded_inputs():
    vision_x, lang_x = inputs()
    mask = torch.ones_like(lang_x)
    mask[1, 11:] = 0
    lang_x[1, 11:] = PAD
    labels = media_labels(lang_x, media_token_id=MEDIA, endofchunk_token_id=END, attention_mask=mask)
    assert (labels >= 0).sum() > 10
    return vision_x, lang_x, mask, labels


@needs_open_flamingo
@pytest.mark.parametrize(("kind", "every"), [*((kind, 1) for kind in PATHS), ("opt", 2), ("llama", 3)])
def test_logits_loss_and_gradients(kind, every):
    peer, model = peer_model(kind, every), our_model(kind, every)
    model.load_openflamingo_state_dict(peer.state_dict())
    vision_x, lang_x, mask, labels = padded_inputs()
    theirs = peer(vision_x, lang_x, attention_mask=mask, labels=labels)
    ours = model(vision_x, lang_x, attention_mask=mask, labels=labels)
    real = mask.bool()
    largest = theirs.logits[real].abs().max()
    assert (ours["logits"] - theirs.logits)[real].abs().max() <= 1e-5 * largest
    assert (ours["loss"] - theirs.loss).abs() <= 1e-5 * theirs.loss
    ours["loss"].backward()
    theirs.loss.backward()
    wanted = {name: p.grad for name, p in peer.named_parameters() if p.requires_grad}
    got = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert wanted.keys() == got.keys()
    largest = max(grad.norm() for grad in got.values())
    for name, grad in wanted.items():
        if grad.shape[0] == model.lang_encoder.get_input_embeddings().num_embeddings:
            rows = torch.zeros(len(grad), 1)
            rows[[MEDIA, END]] = 1
            grad = grad * rows
            assert grad[[MEDIA, END]].norm() > 0, name
        assert (got[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * largest, name


@needs_open_flamingo
def test_patch_tokens_of_older_open_clip():
    """open_clip before 2.24, with which OpenFlamingo was trained, gave them without the last LayerNorm."""
    peer, model = peer_model("opt", normalized=False), our_model("opt", normalized=False)
    model.load_openflamingo_state_dict(peer.state_dict())
    vision_x, lang_x = inputs()
    theirs = peer(vision_x, lang_x).logits
    assert (model(vision_x, lang_x)["logits"] - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    other = our_model("opt", normalized=True)
    other.load_openflamingo_state_dict(peer.state_dict())
    assert (other(vision_x, lang_x)["logits"] - theirs).abs().max() > 1e-2


@needs_open_flamingo
@pytest.mark.parametrize(("kind", "every"), [("opt", 2), ("gpt_neox", 1)])
def test_checkpoints_go_both_ways(kind, every, tmp_path):
    """A checkpoint of ours, filtered as open_flamingo does, gives its model our outputs, and back."""
    peer, model = peer_model(kind, every), open_gates(our_model(kind, every), seed=8)
    with torch.no_grad():
        model.lang_encoder.get_input_embeddings().weight[[MEDIA, END]] += 0.5
        for block in model.gated_blocks():
            block.attn.norm.weight.uniform_(0.5, 1.5)
    model.vision_encoder.load_state_dict(peer.vision_encoder.state_dict())
    saved = model.openflamingo_state_dict()
    assert all("decoder_layer" not in name and "vision" not in name for name in saved)
    before = copy.deepcopy(peer.state_dict())
    found = peer.load_state_dict(saved, strict=False)
    assert found.unexpected_keys == []
    vision_x, lang_x = inputs()
    ours = model(vision_x, lang_x)["logits"]
    theirs = peer(vision_x, lang_x).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    everything = {f"module.{name}": tensor for name, tensor in before.items()}
    torch.save({"model_state_dict": everything, "epoch": 1}, tmp_path / "checkpoint.pt")
    model.load_openflamingo_state_dict(tmp_path / "checkpoint.pt")
    for name, tensor in model.openflamingo_state_dict().items():
        assert torch.equal(tensor, before[name]), name
    only_duplicates = {
        name: tensor for name, tensor in before.items() if ".gated_cross_attn_layer." not in name
    }
    model.load_openflamingo_state_dict(model.openflamingo_state_dict() | saved)
    model.load_openflamingo_state_dict(only_duplicates)
    for name, tensor in model.openflamingo_state_dict().items():
        assert torch.equal(tensor, before[name]), name


@needs_transformers
def test_gpt2_equals_its_layers_by_hand():
    plain, model = language_model("gpt2"), our_model("gpt2", every=2)
    open_gates(model)
    vision_x, lang_x = inputs()
    transformer = plain.transformer
    x = transformer.wte(lang_x) + transformer.wpe(torch.arange(lang_x.shape[1]))
    tokens = model.vision_encoder.patch_tokens(vision_x.flatten(0, 2), normalize=True)
    media = model.perceiver(tokens.unflatten(0, vision_x.shape[:3]))
    seen = intervals.media(intervals.text_time(lang_x == MEDIA), 64, 3)
    blocks = list(model.gated_blocks())
    for index, layer in enumerate(transformer.h):
        if index % 2:
            x = blocks[index // 2](x, media, intervals=seen)
        norm = layer.ln_1(x)
        query, key, value = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in layer.attn.c_attn(norm).split(WIDTH, -1)
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + layer.attn.c_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.ln_2(x))
    wanted = transformer.ln_f(x) @ transformer.wte.weight.T
    assert len(blocks) == 2
    ours = model(vision_x, lang_x)["logits"]
    assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (ours - plain(lang_x).logits).abs().max() > 0.1
