"""Flamingo: what is trained, gates at zero, what text sees, files, errors, state after a failed call."""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks import peers
from tests.flamingo_tiny import (
    END,
    LAYOUTS,
    MEDIA,
    OURS,
    PAD,
    VISION,
    VOCABULARY,
    WIDTH,
    config,
    flamingo,
    inputs,
    language_model,
)
from vlmkernels.models import clip, decoder
from vlmkernels.models.decoder import CausalLM, DecoderConfig
from vlmkernels.models.flamingo import CONFIGS, Flamingo, FlamingoConfig

needs_transformers = pytest.mark.skipif(
    peers.why_not("transformers") is not None, reason=str(peers.why_not("transformers"))
)
KINDS = ["ours", *(pytest.param(kind, marks=needs_transformers) for kind in LAYOUTS)]


def loss_of(model, seed=0):
    vision_x, lang_x = inputs(seed)
    return model(vision_x, lang_x, labels=lang_x)["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_gates_at_zero_give_the_language_model_exactly(kind):
    plain, model = language_model(kind), flamingo(kind, cross_attn_every_n_layers=2)
    vision_x, lang_x = inputs()
    mask = torch.ones_like(lang_x)
    mask[0, :3] = 0
    wanted = plain(lang_x).logits
    assert not torch.equal(model(vision_x, lang_x)["logits"], wanted)
    assert torch.equal(model.lang_encoder(lang_x).logits, wanted), "called directly, without images"
    with torch.no_grad():
        for block in model.gated_blocks():
            block.attn_gate.zero_()
            block.ff_gate.zero_()
    assert torch.equal(model(vision_x, lang_x)["logits"], wanted)
    masked = plain(**model._call.arguments(lang_x, mask)).logits
    assert torch.equal(model(vision_x, lang_x, mask)["logits"], masked)


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_resampler_gated_blocks_and_two_rows_are_trained(kind):
    model = flamingo(kind).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=0.01)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    embedding = model.lang_encoder.get_input_embeddings().weight
    shared = {
        name for name, tensor in model.state_dict().items() if tensor.data_ptr() == embedding.data_ptr()
    }
    for name, tensor in model.state_dict().items():
        changed = tensor != before[name]
        if name in shared:
            assert changed.flatten(1).any(1).nonzero().flatten().tolist() == [MEDIA, END], name
        else:
            trained = name.startswith("perceiver.") or ".gated_cross_attn_layer." in name
            assert changed.any() == trained, name
    assert not model.vision_encoder.training
    assert model.lang_encoder.training
    groups = model.parameter_groups(0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    decayed = {id(p) for p in groups[0]["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (".gated_cross_attn_layer." in name)


def test_without_trained_embeddings():
    model = flamingo(train_embeddings=False)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("perceiver.") or ".gated_cross_attn_layer." in name for name in names)
    assert any(name.startswith("perceiver.") for name in names)


def test_queries_and_keys_are_normalised():
    """With ``qk_norm`` their scale plays no part, in the resampler and in the gated blocks."""
    vision_x, lang_x = inputs()
    for normalised in (True, False):
        model = flamingo(qk_norm=normalised)
        attentions = [attention for attention, _ in model.perceiver.layers]
        attentions += [block.attn for block in model.gated_blocks()]
        with torch.no_grad():
            before = model(vision_x, lang_x)["logits"]
            for attention in attentions:
                attention.to_q.weight.mul_(8)
            after = model(vision_x, lang_x)["logits"]
            scale = before.abs().max()
        assert ((before - after).abs().max() < 1e-3 * scale) == normalised


@pytest.mark.parametrize("immediate", [True, False])
def test_a_later_image_never_changes_earlier_logits(immediate):
    model = flamingo(only_attend_immediate_media=immediate)
    vision_x, lang_x = inputs()
    first = model(vision_x, lang_x)["logits"]
    for image in range(3):
        other = vision_x.clone()
        other[:, image] += 3.0
        change = (model(other, lang_x)["logits"] - first).abs().amax(-1)  # [B, T]
        for row in range(len(lang_x)):
            places = (lang_x[row] == MEDIA).nonzero().flatten().tolist()
            if image >= len(places):  # an image that no token stands for
                assert not change[row].any()
                continue
            assert not change[row, : places[image]].any()
            assert change[row, places[image]] > 1e-4


def test_text_before_an_image_and_text_alone():
    model = flamingo()
    vision_x, lang_x = inputs()
    lang_x[lang_x == MEDIA] = 5
    with_images = model(vision_x, lang_x)["logits"]
    assert torch.equal(with_images, model(vision_x[:, :1] + 9, lang_x)["logits"])
    alone = model(None, lang_x)["logits"]
    assert (with_images - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert (alone - model.lang_encoder(lang_x).logits).abs().max() > 1e-2, "the gated FFW acts without images"


def test_stored_patch_tokens_stand_for_pixels():
    model = flamingo(max_num_frames=2)
    vision_x, lang_x = inputs()
    frames = torch.cat([vision_x, vision_x.flip(0)], 2)
    for images in (vision_x, frames):
        stored = model.encode_vision(images)
        assert stored.shape == (3, 3, images.shape[2], 4, 24)
        assert not stored.requires_grad
        assert torch.equal(model(stored, lang_x)["logits"], model(images, lang_x)["logits"])
    assert not torch.equal(model(frames, lang_x)["logits"], model(vision_x, lang_x)["logits"])


def test_any_module_that_gives_patch_tokens_is_a_vision_encoder():
    tower = clip.CLIP(VISION).visual

    class Pair(torch.nn.Module):
        def forward(self, images):
            return tower(images), tower.patch_tokens(images)

    class Alone(torch.nn.Module):
        def forward(self, images):
            return tower.patch_tokens(images)

    plain = flamingo()
    vision_x, lang_x = inputs()
    results = []
    for encoder in (tower, Pair(), Alone()):
        parts = {"vision_encoder": encoder, "lang_encoder": language_model("ours")}
        model = Flamingo(config(vision=None, vision_width=24), **parts)
        model.load_openflamingo_state_dict(plain.openflamingo_state_dict())
        results.append(model(vision_x, lang_x)["logits"])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    """The loss and the logits of a text are the same alone, padded on the right, and on the left."""
    model = flamingo(kind)
    vision_x, lang_x = inputs()
    alone = model(vision_x, lang_x)["logits"]
    pad, ones = lang_x.new_full((3, 4), PAD), torch.ones_like(lang_x)
    for left in (False, True):
        parts = [(pad, torch.zeros_like(pad)), (lang_x, ones)]
        text, mask = (torch.cat(each, 1) for each in zip(*(parts if left else parts[::-1]), strict=True))
        logits = model(vision_x, text, mask)["logits"]
        logits = logits[:, 4:] if left else logits[:, :-4]
        assert (logits - alone).abs().max() <= 2e-5 * alone.abs().max(), left


def test_loss_is_the_mean_over_counted_labels():
    model = flamingo()
    vision_x, lang_x = inputs()
    labels = lang_x.masked_fill(torch.rand(lang_x.shape) < 0.5, -100)
    out = model(vision_x, lang_x, labels=labels)
    log_p = out["logits"].detach().log_softmax(-1)
    terms = [
        -log_p[row, t - 1, labels[row, t]]
        for row in range(len(labels))
        for t in range(1, labels.shape[1])
        if labels[row, t] != -100
    ]
    assert float(out["loss"].detach()) == pytest.approx(float(sum(terms) / len(terms)), rel=1e-5)
    none = model(vision_x, lang_x, labels=torch.full_like(lang_x, -100))["loss"]
    none.backward()
    assert none == 0
    assert not model.perceiver.latents.grad.any()


def test_a_failed_call_leaves_nothing_behind():
    model = flamingo()
    vision_x, lang_x = inputs()
    wanted, plain = model(vision_x, lang_x)["logits"], model.lang_encoder(lang_x).logits
    last = model.lang_encoder.transformer.h[-1]

    def fail(*_):
        raise KeyError("stop")

    handle = last.register_forward_pre_hook(fail)
    for call in (
        lambda: model(vision_x + 1, lang_x),
        lambda: model.generate(vision_x, lang_x, max_new_tokens=2),
    ):
        with pytest.raises(KeyError, match="stop"):
            call()
        assert model._condition.empty
    handle.remove()
    assert torch.equal(model.lang_encoder(lang_x).logits, plain)
    assert torch.equal(model(vision_x, lang_x)["logits"], wanted)

    handle = last.register_forward_pre_hook(lambda *_: model(vision_x, lang_x))
    with pytest.raises(RuntimeError, match="during another call"):
        model(vision_x, lang_x)
    handle.remove()
    assert torch.equal(model(vision_x, lang_x)["logits"], wanted)


@pytest.mark.parametrize(
    "kind", ["ours", pytest.param("llama", marks=[needs_transformers, pytest.mark.slow])]
)
def test_under_torch_compile(kind):
    model = flamingo(kind, cross_attn_every_n_layers=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        vision_x, lang_x = inputs(seed)
        wanted = model(vision_x, lang_x, labels=lang_x)
        got = compiled(vision_x, lang_x, labels=lang_x)
        assert (got["logits"] - wanted["logits"]).abs().max() <= 1e-5 * wanted["logits"].abs().max()
        assert model._condition.empty
        wanted["loss"].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        got["loss"].backward()
        for name, gradient in gradients.items():
            error = (model.get_parameter(name).grad - gradient).norm()
            assert error <= 1e-4 * gradient.norm() + 1e-6, name
        model.zero_grad()


@needs_transformers
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_with_checkpointed_layers(kind):
    model = flamingo(kind).train()
    loss_of(model).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.lang_encoder.activation_checkpointing_enable()
    loss_of(model).backward()
    for name, gradient in wanted.items():
        error = (model.get_parameter(name).grad - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind):
    model = flamingo(kind)
    vision_x, lang_x = inputs()
    exact = model(vision_x, lang_x, labels=lang_x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(vision_x, lang_x, labels=lang_x)
    assert out["loss"].dtype == torch.float32
    assert (out["loss"] - exact["loss"]).abs() <= 0.02 * exact["loss"]
    out["loss"].backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(vision_x, lang_x, max_new_tokens=2, num_beams=2).shape[0] == 3


def test_learns_to_name_images_and_needs_them():
    """Four images, four words, a frozen random language model: the images are learnt, nothing else helps."""
    model = Flamingo(config(), lang_encoder=language_model("ours")).train()
    assert not any(block.attn_gate.any() or block.ff_gate.any() for block in model.gated_blocks())
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=1e-2)
    images = torch.randn(4, 1, 1, 3, 16, 16)
    text = torch.tensor([[MEDIA, 7, word, END] for word in (10, 11, 12, 13)])
    labels = torch.where((text >= 10) & (text <= 13), text, -100)
    for _ in range(60):
        optimizer.zero_grad()
        model(images, text, labels=labels)["loss"].backward()
        optimizer.step()
    model.eval()
    loss = float(model(images, text, labels=labels)["loss"].detach())
    assert loss < 0.2 < 1.38 < float(model(images.roll(1, 0), text, labels=labels)["loss"].detach())
    assert model.generate(images, text[:, :2], max_new_tokens=1).flatten().tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("part", ["flamingo", "decoder"])
def test_saved_and_loaded(part, tmp_path):
    model = (
        flamingo(cross_attn_every_n_layers=2, max_num_media=4)
        if part == "flamingo"
        else language_model("ours")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not again.training
    if part == "flamingo":
        loss_of(again).backward()
        gradient = again.lang_encoder.transformer.wte.weight.grad
        assert gradient.abs().sum(1).nonzero().flatten().tolist() == [MEDIA, END]


@needs_transformers
def test_a_foreign_language_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="openflamingo_state_dict"):
        flamingo("opt").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_published_sizes():
    assert {
        name: (c.language_width, c.language_layers) for name, c in CONFIGS.items() if c.language is None
    } == {
        "OpenFlamingo-3B": (2048, 24),
        "OpenFlamingo-3B-Instruct": (2048, 24),
        "OpenFlamingo-4B": (2560, 32),
        "OpenFlamingo-4B-Instruct": (2560, 32),
        "OpenFlamingo-9B": (4096, 32),
    }
    counts = {}
    for name, blocks in (("OpenFlamingo-3B", 24), ("OpenFlamingo-4B", 16), ("OpenFlamingo-9B", 8)):
        c = CONFIGS[name]
        with torch.device("meta"):
            language = CausalLM(DecoderConfig(50304, c.language_width, c.language_layers, 8))
            model = Flamingo(c, lang_encoder=language)
        assert len(list(model.gated_blocks())) == blocks
        assert model.perceiver.latents.shape == (64, 1024)
        counts[name] = sum(p.numel() for block in model.gated_blocks() for p in block.parameters())
        d, inner = c.language_width, 512
        one = (2 * d + d * inner + 1024 * 2 * inner + inner * d + 1) + (2 * d + 8 * d * d + 1)
        assert counts[name] == blocks * one
    tiny = Flamingo(CONFIGS["emoji-tiny"])
    assert 1e6 <= sum(p.numel() for p in CausalLM(decoder.CONFIGS["emoji-tiny"]).parameters()) <= 2e6
    assert tiny.encode_vision(torch.randn(1, 2, 1, 3, 48, 48)).shape == (1, 2, 1, 36, 128)


def test_configs_that_do_not_fit():
    with pytest.raises(ValueError) as caught:
        FlamingoConfig(7, 7, heads=0, cross_attn_every_n_layers=0)
    for part in (
        "media_token_id and endofchunk_token_id must differ, got 7 for both",
        "vision_width must be a number without `vision`, got None",
        "language_width must be a number without `language`, got None",
        "heads must be at least 1, got 0",
        "cross_attn_every_n_layers must be at least 1, got 0",
    ):
        assert part in str(caught.value)
    with pytest.raises(
        ValueError,
        match=r"media_token_id must be an id .* got 40.*language_width must be .*, as in `language`, got 5",
    ):
        FlamingoConfig(40, END, VISION, OURS, language_width=5)
    with pytest.raises(ValueError, match="ModifiedResNet"):
        config(vision=clip.CONFIGS["RN50"])
    with pytest.raises(ValueError, match=r"layers must be at least 1, got 0; heads must be .*, got 3"):
        DecoderConfig(10, width=32, heads=3, layers=0)


def test_modules_that_do_not_fit():
    external = FlamingoConfig(MEDIA, END, vision_width=24, language_width=WIDTH)
    with pytest.raises(ValueError, match="vision_encoder must be given"):
        Flamingo(external)
    with pytest.raises(ValueError, match="lang_encoder must be given"):
        Flamingo(config("opt"))
    with pytest.raises(ValueError, match=r"other tensors than the tower of config\.vision"):
        Flamingo(config(), vision_encoder=clip.CLIP(replace(VISION, vision_layers=3)).visual)
    for changes in ({"vision_heads": 2}, {"quick_gelu": True}, {"vision_eps": 1e-6}, {"vision_pool": "mean"}):
        with pytest.raises(ValueError, match=r"other heads, activations, epsilons or pooling than the tower"):
            Flamingo(config(), vision_encoder=clip.CLIP(replace(VISION, **changes)).visual)
    small = DecoderConfig(30, width=16, layers=2, heads=2)
    with pytest.raises(ValueError) as caught:
        Flamingo(replace(config("opt"), cross_attn_every_n_layers=3), lang_encoder=CausalLM(small))
    for part in ("width is 16", "2 layers, cross_attn_every_n_layers is 3", "embedding has 30 rows"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"its config is not config\.language"):
        Flamingo(config(), lang_encoder=CausalLM(replace(OURS, context_length=9)))
    with pytest.raises(ValueError, match="already belongs to a Flamingo"):
        Flamingo(config(), lang_encoder=flamingo().lang_encoder)
    with pytest.raises(ValueError, match="Linear has no layers under any of"):
        Flamingo(config("opt"), lang_encoder=torch.nn.Linear(2, 2))


def test_inputs_that_do_not_fit():
    model = flamingo()
    vision_x, lang_x = inputs()
    with pytest.raises(ValueError) as caught:
        model(vision_x[:2, :, :, :, :8], lang_x.float(), lang_x[:, 1:], lang_x[:1])
    for part in (
        "lang_x must be integers",
        "attention_mask must be [3, 14]",
        "labels must be",
        "vision_x must be",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="up to 3 image tokens in a row, vision_x has 1"):
        model(vision_x[:, :1], lang_x)
    with pytest.raises(ValueError, match="up to 3 image tokens in a row, vision_x has 0"):
        model(None, lang_x)
    with pytest.raises(ValueError, match="at most context_length = 64 tokens, got 65"):
        model(None, torch.ones(1, 65, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[1, 5\] with the cached tokens, got \[1, 4\]"
    ):
        model.lang_encoder(torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 4))


def test_it_builds_the_image_tower_of_a_clip_alone(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a whole CLIP was built")

    monkeypatch.setattr(clip.CLIP, "__init__", refuse)
    assert isinstance(Flamingo(config()).vision_encoder, clip.VisionTransformer)


def test_state_dicts_that_do_not_fit(tmp_path):
    model = flamingo()
    given = model.openflamingo_state_dict()
    name = "lang_encoder.transformer.h.1.gated_cross_attn_layer.ff.1.weight"
    wrong = {key: tensor for key, tensor in given.items() if key != "perceiver.latents"}
    wrong |= {name: torch.zeros(3), "perceiver.layers.9.0.to_q.weight": torch.zeros(1)}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as caught:
        model.load_openflamingo_state_dict(wrong)
    for part in (
        "1 missing: perceiver.latents",
        "1 unknown: perceiver.layers.9.0.to_q.weight",
        f"{name} must be [",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="no such file"):
        model.load_openflamingo_state_dict(tmp_path / "none.pt")
    model.load_openflamingo_state_dict(
        given | {"lang_encoder.transformer.h.0.decoder_layer.old_buffer": torch.zeros(1)}
    )
    grown = torch.zeros(VOCABULARY + 8, WIDTH)
    with pytest.raises(ValueError, match=r"wte.weight must be \[40, 32\], got \[48, 32\]"):
        model.load_openflamingo_state_dict(given | {"lang_encoder.transformer.wte.weight": grown})
