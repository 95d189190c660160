"""ALIGN: equal to transformers.AlignModel at random weights; loss, loading, bad input."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.models.peer_models import transformers_align
from vlmkernels.models import efficientnet
from vlmkernels.models.align import ALIGN, CONFIGS, AlignConfig, infer_config, paper_config
from vlmkernels.models.efficientnet import COEFFICIENTS, EfficientNet

needs_transformers = pytest.mark.skipif(
    peers.why_not("transformers") is not None, reason=f"transformers: {peers.why_not('transformers')}"
)
TINY = AlignConfig(
    embed_dim=80,
    image_size=64,
    image_width=0.25,
    image_depth=0.4,
    image_padding="fixed",
    drop_rate=0.0,
    vocab_size=97,
    max_positions=24,
    context_length=16,
    text_width=128,
    text_layers=2,
    text_mlp_width=192,
    text_dropout=0.0,
    init_temperature=0.2,
)


def randomize(model: torch.nn.Module) -> None:
    """Weights and BatchNorm statistics at which activations neither vanish nor explode over the depth."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5)
                if name.endswith("project_bn.weight"):
                    tensor.mul_(1.4)  # squeeze-and-excitation halves
            elif name.endswith(("running_mean", "bias")):
                tensor.normal_(std=0.1)
            elif tensor.dim() == 4:
                tensor.normal_(std=(2.0 / tensor[0].numel()) ** 0.5)
            elif tensor.dim() == 2:
                tensor.normal_(std=0.1 if "embeddings" in name else tensor.shape[1] ** -0.5)


def batch(config: AlignConfig, size: int = 6, side: int = 64, length: int = 12):
    """Images, tokens and the attention mask of texts of different lengths."""
    images = torch.randn(size, 3, side, side)
    lengths = torch.randint(2, length + 1, (size,))
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    return images, torch.randint(1, config.vocab_size, (size, length)) * mask, mask


@functools.cache
def pair() -> tuple[ALIGN, torch.nn.Module]:
    """Our tiny ALIGN and the peer with the same random weights, both in evaluation mode."""
    torch.manual_seed(0)
    peer = transformers_align(TINY).eval()
    randomize(peer)
    with torch.no_grad():
        peer.temperature.fill_(0.2)
    return ALIGN.from_hf_state_dict(peer.state_dict(), TINY), peer


def grads(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: torch.nn.Module, peer: torch.nn.Module) -> None:
    got, want = grads(ours), grads(peer)
    assert set(got) == set(want)
    assert "temperature" in got
    largest = max(g.abs().max() for g in want.values())
    for name, gradient in want.items():
        bound = (
            1e-4 * gradient.norm() + 1e-6 * largest
        )  # the second term: gradients that are 0 but for rounding
        assert (got[name] - gradient).norm() <= bound * gradient.numel() ** 0.5, name


# Parity with transformers


@needs_transformers
@pytest.mark.parametrize("side", [64, 80, 47])
def test_outputs_equal_transformers(side):
    ours, peer = pair()
    images, tokens, mask = batch(TINY, side=side)
    with torch.no_grad():
        out = ours(images, tokens)
        want = peer(input_ids=tokens, pixel_values=images, attention_mask=mask.long())
        image, text = ours.encode_image(images), ours.encode_text(tokens, attention_mask=mask)
    raw_image, raw_text = want.vision_model_output.pooler_output, peer.get_text_features(tokens, mask.long())
    assert raw_image.std(0).mean() > 1e-2, "the tower is dead: parity would mean nothing"
    assert (image - raw_image).abs().max() <= 1e-5 * raw_image.abs().max()
    assert (text - raw_text.pooler_output).abs().max() <= 1e-5 * text.abs().max()
    assert (out["image_features"] - want.image_embeds).abs().max() <= 1e-5
    assert (out["text_features"] - want.text_embeds).abs().max() <= 1e-5
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    assert (logits - want.logits_per_image).abs().max() <= 1e-5 * out["logit_scale"]


@needs_transformers
def test_loss_and_gradients_equal_transformers():
    ours, peer = pair()
    images, tokens, mask = batch(TINY)
    ours.zero_grad()
    peer.zero_grad()
    loss = ours.loss(images, tokens)
    want = peer(input_ids=tokens, pixel_values=images, attention_mask=mask.long(), return_loss=True).loss
    assert abs(loss - want) <= 1e-5 * abs(want)
    loss.backward()
    want.backward()
    assert_same_gradients(ours, peer)


@needs_transformers
def test_training_mode_equals_transformers_but_for_running_statistics():
    """Batch statistics and gradients agree; the peer takes TensorFlow's momentum 0.99 for torch's."""
    torch.manual_seed(1)
    peer = transformers_align(TINY)
    randomize(peer)
    ours = ALIGN.from_hf_state_dict(peer.state_dict(), TINY).train()
    peer.train()
    images, tokens, mask = batch(TINY)
    name = "vision_model.embeddings.batchnorm.running_mean"
    before = ours.state_dict()[name].clone()
    loss = ours.loss(images, tokens)
    want = peer(input_ids=tokens, pixel_values=images, attention_mask=mask.long(), return_loss=True).loss
    assert abs(loss - want) <= 1e-5 * abs(want)
    loss.backward()
    want.backward()
    assert_same_gradients(ours, peer)
    statistic = (peer.state_dict()[name] - 0.01 * before) / 0.99
    torch.testing.assert_close(
        ours.state_dict()[name], 0.99 * before + 0.01 * statistic, atol=1e-5, rtol=1e-5
    )


@needs_transformers
def test_same_padding_equals_transformers_where_it_names_the_odd_blocks():
    """At 80 pixels the maps are 40, 20, 10, 5 and 3 wide: block 7 is the one that halves an odd side."""
    peer = transformers_align(TINY, depthwise_padding=(7,)).eval()
    randomize(peer)
    ours = ALIGN.from_hf_state_dict(peer.state_dict(), dataclasses.replace(TINY, image_padding="same"))
    images = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        want = peer.get_image_features(images)
        assert want.last_hidden_state.shape[2:] == (3, 3)
        bound = 1e-5 * want.pooler_output.abs().max()
        assert (ours.encode_image(images) - want.pooler_output).abs().max() <= bound
        ours.vision_model = ALIGN.from_hf_state_dict(peer.state_dict(), TINY).vision_model
        assert (ours.encode_image(images) - want.pooler_output).abs().max() > 1e3 * bound


@needs_transformers
@pytest.mark.parametrize("name", [*COEFFICIENTS])
def test_towers_have_the_names_and_shapes_of_transformers(name):
    transformers = peers.load("transformers")
    width, depth, _ = COEFFICIENTS[name]
    with torch.device("meta"):
        ours = EfficientNet(width, depth)
        options = transformers.AlignVisionConfig(width_coefficient=width, depth_coefficient=depth)
        peer = transformers.AlignVisionModel(options)
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in peer.state_dict().items()}


@needs_transformers
def test_align_base_is_the_default_of_transformers():
    transformers = peers.load("transformers")
    with torch.device("meta"):
        ours, peer = ALIGN(CONFIGS["align-base"]), transformers.AlignModel(transformers.AlignConfig())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in peer.state_dict().items()
    }
    assert sum(p.numel() for p in ours.parameters()) == 172_117_841


# Published sizes


def test_the_published_model():
    with torch.device("meta"):
        model = ALIGN(CONFIGS["align-l2"])
    blocks = model.vision_model.encoder["blocks"]
    assert len(blocks) == 88
    assert blocks[-1].projection["project_conv"].weight.shape == (1376, 8256, 1, 1)
    assert sum(p.numel() for p in model.vision_model.parameters()) == 467_219_796
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 874.9
    assert model.text_projection.weight.shape == (1376, 1024)


def test_grid_of_the_paper_embeds_into_640():
    for image in ("b1", "b3", "b5", "b7"):
        for text, width in (("mini", 256), ("medium", 512), ("base", 768), ("large", 1024)):
            config = CONFIGS[f"align-{image}-{text}"]
            assert (config.embed_dim, config.text_width, config.text_heads) == (640, width, width // 64)
            assert config.image_projection == (image != "b7")
    with pytest.raises(ValueError, match="got 'b9' and 'base'"):
        paper_config("b9", "base")


# Training behaviour


def test_every_trainable_parameter_gets_a_gradient():
    model = ALIGN(CONFIGS["emoji-tiny"]).train()
    images, tokens, _ = batch(model.config, side=48)
    model.loss(images, tokens).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    pooled = ALIGN(TINY)
    frozen = {name for name, p in pooled.named_parameters() if not p.requires_grad}
    assert frozen == {"text_model.pooler.dense.weight", "text_model.pooler.dense.bias"}


def test_an_untrained_deep_model_has_a_finite_loss():
    """Features shrink from block to block before the statistics are learned; the loss must not be 0/0."""
    model = ALIGN(dataclasses.replace(CONFIGS["emoji-tiny"], image_depth=5.3))
    images, tokens, _ = batch(model.config, side=48)
    for mode in (False, True):
        loss = model.train(mode).loss(images, tokens)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_few_steps_fit_a_batch():
    model = ALIGN(CONFIGS["emoji-tiny"]).train()
    images, tokens, _ = batch(model.config, size=16, side=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = model.loss(images, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.clamp_logit_scale_()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_compiles_into_one_graph():
    model = ALIGN(dataclasses.replace(TINY, image_depth=0.1)).eval()
    images, tokens, _ = batch(TINY)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name, value in compiled(images, tokens).items():
        torch.testing.assert_close(value, model(images, tokens)[name])


def test_autocast_to_bf16():
    model = ALIGN(CONFIGS["emoji-tiny"]).train()
    images, tokens, _ = batch(model.config, side=48)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(images, tokens)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss - model.loss(images, tokens)) < 0.05 * loss


# The loss and the temperature


def test_loss_is_label_smoothed_cross_entropy_over_the_temperature():
    model = ALIGN(dataclasses.replace(TINY, init_temperature=0.5)).eval()
    images, tokens, _ = batch(TINY, size=5)
    with torch.no_grad():
        image = F.normalize(model.encode_image(images), dim=-1)
        text = F.normalize(model.encode_text(tokens), dim=-1)
        logits, target = image @ text.T / 0.5, torch.arange(5)
        for smoothing in (0.1, 0.0, 0.3):
            rows = F.cross_entropy(logits, target, label_smoothing=smoothing)
            columns = F.cross_entropy(logits.T, target, label_smoothing=smoothing)
            got = model.loss(images, tokens, label_smoothing=smoothing)
            torch.testing.assert_close(got, (rows + columns) / 2)
            got = model.loss(images, tokens, label_smoothing=smoothing, directions="sum")
            torch.testing.assert_close(got, rows + columns)
        default = model.loss(images, tokens)
        torch.testing.assert_close(default, model.loss(images, tokens, label_smoothing=0.1))
        ids = torch.tensor([0, 1, 1, 2, 3])
        shared = (ids[:, None] == ids).float()
        shared = 0.9 * shared / shared.sum(1, keepdim=True) + 0.1 / 5
        want = (F.cross_entropy(logits, shared) + F.cross_entropy(logits.T, shared)) / 2
        torch.testing.assert_close(model.loss(images, tokens, positives=(ids, ids)), want)
    with pytest.raises(ValueError, match="directions must be 'mean' or 'sum', got 'max'"):
        model.loss(images, tokens, directions="max")


def test_temperature_divides_and_has_a_floor():
    model = ALIGN(CONFIGS["emoji-tiny"])
    torch.testing.assert_close(model.scale(), torch.tensor(1 / 0.07))
    model.scale().backward()
    torch.testing.assert_close(model.temperature.grad, torch.tensor(-1 / 0.07**2))
    for value in (0.001, 0.0, -3.0):
        model.temperature.data.fill_(value)
        torch.testing.assert_close(model.scale(), torch.tensor(100.0))
        model.clamp_logit_scale_()
        assert model.temperature.item() == pytest.approx(0.01)
    model.temperature.grad = None
    model.scale().backward()
    assert model.temperature.grad < 0, "at the floor the temperature can still grow"
    model.temperature.data.fill_(2.0)
    model.clamp_logit_scale_()
    assert model.temperature.item() == 2.0


# Text


def test_padding_and_mask():
    model = ALIGN(CONFIGS["emoji-tiny"]).eval()
    tokens = torch.randint(1, 4096, (3, 9))
    padded = F.pad(tokens, (0, 5))
    with torch.no_grad():
        want = model.encode_text(tokens)
        torch.testing.assert_close(model.encode_text(padded), want)
        mask = (padded != 0).long()
        torch.testing.assert_close(model.encode_text(padded, attention_mask=mask), want)
        seen = model.encode_text(padded, attention_mask=torch.ones_like(mask))
        assert (seen - want).abs().max() > 1e-3
        padded[:, 0] = mask[:, 0] = 1
        want = model.encode_text(padded, attention_mask=mask)
        padded[:, 0] = model.config.pad_id
        padded_first = model.encode_text(padded, attention_mask=mask)
        assert (padded_first - want).abs().max() > 1e-3
        torch.testing.assert_close(
            model.encode_text(padded), padded_first
        )  # [CLS] is attended whatever its id


def test_cls_is_the_first_row_of_the_whole_encoder():
    model = ALIGN(CONFIGS["emoji-tiny"]).eval()
    _, tokens, _ = batch(model.config)
    with torch.no_grad():
        torch.testing.assert_close(model.text_model(tokens, cls_only=True), model.text_model(tokens)[:, 0])


# Saving, loading, bad input


def test_save_and_load(tmp_path):
    model = ALIGN(CONFIGS["emoji-tiny"])
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    loaded = ALIGN.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    images, tokens, _ = batch(model.config, side=48)
    with torch.no_grad():
        for name, value in model(images, tokens).items():
            assert torch.equal(value, loaded(images, tokens)[name]), name


def test_config_is_read_off_the_shapes():
    for image, (width, depth, _) in COEFFICIENTS.items():
        features = efficientnet.round_channels(320, width)
        config = dataclasses.replace(
            TINY, image_width=width, image_depth=depth, embed_dim=features, drop_rate=0.2, text_dropout=0.1
        )
        with torch.device("meta"):
            state = ALIGN(config).state_dict()
        want = dataclasses.replace(config, image_size=289, context_length=24, init_temperature=1.0)
        assert infer_config(state, text_heads=None) == want, image
    with pytest.raises(ValueError, match="text_heads: not determined by shapes"):
        infer_config(state)


def test_hf_state_dict_errors_list_every_key():
    model = ALIGN(TINY)
    state = dict(model.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(24)[None]  # of older releases
    assert torch.equal(ALIGN.from_hf_state_dict(state, TINY).temperature, model.temperature)
    with pytest.raises(ValueError, match=r"10 blocks up to 80 channels are not B0-B7 or L2; pass config"):
        ALIGN.from_hf_state_dict(state, text_heads=2)
    with pytest.raises(ValueError, match="state_dict must be an ALIGN's, but it has no key"):
        ALIGN.from_hf_state_dict({"logit_scale": torch.zeros(())}, text_heads=2)
    state["extra.weight"] = torch.zeros(1)
    del state["temperature"]
    state["text_projection.bias"] = torch.zeros(3)
    with pytest.raises(ValueError) as error:
        ALIGN.from_hf_state_dict(state, TINY)
    for part in ("temperature", "extra.weight", r"text_projection.bias must be [80] by the config, got [3]"):
        assert part in str(error.value)


@pytest.mark.parametrize("value", [0.005, -1.0, float("nan")])
def test_hf_state_dict_with_a_temperature_below_the_floor(value):
    state = dict(ALIGN(TINY).state_dict())
    state["temperature"] = torch.tensor(value)
    with pytest.raises(ValueError, match=r"temperature must be at least min_temperature 0.01, got"):
        ALIGN.from_hf_state_dict(state, TINY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dim": 96}, "embed_dim must be 80, the image channels, without image_projection, got 96"),
        ({"image_padding": "valid"}, "image_padding must be one of .*, got 'valid'"),
        ({"image_strides": (1, 2, 3)}, "image_strides must be seven values of 1 or 2, got"),
        ({"image_depth": 0.0}, r"image_width and image_depth must be in \(0, 100\], got .*, 0.0"),
        ({"text_layers": 0, "vocab_size": -3}, "vocab_size must be at least 1, got -3; text_layers must"),
        (
            {"text_activation": "tanh", "text_eps": -1.0},
            "text_activation must .* got 'tanh'; text_eps must not be negative",
        ),
        ({"image_width": 1e9}, "image_width and image_depth must be .*, got 1000000000.0, 0.4"),
        ({"text_heads": 3}, "text_heads must be a divisor of text_width 128, got 3"),
        ({"context_length": 25}, r"context_length must be in \[1, max_positions = 24\], got 25"),
        ({"pad_id": 97}, r"pad_id must be in \[0, vocab_size = 97\), got 97"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\), got 1.0"),
        ({"min_temperature": 0.0}, "must satisfy 0 < min_temperature <= init_temperature, got"),
        ({"init_temperature": 0.001}, "must satisfy 0 < min_temperature <= init_temperature, got"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


def test_config_lists_all_faults():
    with pytest.raises(ValueError, match=r"embed_dim.*text_heads.*pad_id"):
        dataclasses.replace(TINY, embed_dim=1, text_heads=5, pad_id=-1)


def test_input_errors():
    model = ALIGN(TINY).eval()
    tokens = torch.ones(2, 5, dtype=torch.int64)
    for images in (torch.zeros(3, 64, 64), torch.zeros(2, 1, 64, 64), torch.zeros(2, 3, 64, 64).byte()):
        with pytest.raises(ValueError, match=r"images must be floating \[B, 3, H, W\], got"):
            model.encode_image(images)
    with pytest.raises(ValueError, match="sides of at least 32 pixels with padding 'fixed', got 31 x 64"):
        model.encode_image(torch.zeros(2, 3, 31, 64))
    for bad in (tokens[0], tokens.float()):
        with pytest.raises(ValueError, match=r"tokens must be integer ids \[B, L\], got"):
            model.encode_text(bad)
    with pytest.raises(ValueError, match="tokens must have length 1 to 24"):
        model.encode_text(torch.ones(1, 25, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 5\), got \(2, 4\)"):
        model.encode_text(tokens, attention_mask=tokens[:, 1:])
    with pytest.raises(ValueError, match="config of ALIGN must be a AlignConfig, got dict"):
        ALIGN({"embed_dim": 80})
