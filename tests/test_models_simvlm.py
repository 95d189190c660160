"""SimVLM: parts against torch.nn and torchvision, masks and bias against dense ones, loss, training."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import peers
from tests.simvlm_tiny import FORMS, randomize, tiny_batch, tiny_config, tiny_model
from vlmkernels import intervals
from vlmkernels.models.parts.resnet import ResNet
from vlmkernels.models.parts.transformer import Block
from vlmkernels.models.simvlm import SimVLM, transformer_block

needs_torchvision = pytest.mark.skipif(
    peers.why_not("torchvision") is not None, reason=f"torchvision: {peers.why_not('torchvision')}"
)
both_forms = pytest.mark.parametrize("form", FORMS)
close = torch.testing.assert_close


def gradients(module, loss) -> dict:
    """Name -> gradient of every parameter that has one."""
    module.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# Names of torch.nn's layers -> those of a Block.
TORCH_NAMES = {
    "self_attn.in_proj_weight": ["attn.in_proj_weight"],
    "self_attn.in_proj_bias": ["attn.in_proj_bias"],
    "self_attn.out_proj.weight": ["attn.out_proj.weight"],
    "self_attn.out_proj.bias": ["attn.out_proj.bias"],
    "multihead_attn.in_proj_weight": ["cross.q_proj.weight", "cross.kv_proj.weight"],
    "multihead_attn.in_proj_bias": ["cross.q_proj.bias", "cross.kv_proj.bias"],
    "multihead_attn.out_proj.weight": ["cross.out_proj.weight"],
    "multihead_attn.out_proj.bias": ["cross.out_proj.bias"],
    "linear1.weight": ["mlp.c_fc.weight"],
    "linear1.bias": ["mlp.c_fc.bias"],
    "linear2.weight": ["mlp.c_proj.weight"],
    "linear2.bias": ["mlp.c_proj.bias"],
}


def torch_layer(block: Block, cross: bool) -> tuple[nn.Module, dict]:
    """torch.nn's layer with the weights of `block`, and its names for them."""
    width, heads = block.ln_1.weight.shape[0], block.attn.heads
    kind = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    layer = kind(width, heads, 4 * width, dtype=torch.float64, **options)
    norms = ["ln_1", "ln_cross", "ln_2"] if cross else ["ln_1", "ln_2"]
    names = {
        **TORCH_NAMES,
        **{f"norm{i + 1}.{w}": [f"{norm}.{w}"] for i, norm in enumerate(norms) for w in ("weight", "bias")},
    }
    ours = block.state_dict()
    layer.load_state_dict({name: torch.cat([ours[n] for n in names[name]]) for name in layer.state_dict()})
    return layer, names


def compare_gradients(block: Block, ours: dict, layer: nn.Module, theirs: dict, names: dict) -> None:
    assert len(theirs) == len(dict(layer.named_parameters()))
    for name, gradient in theirs.items():
        close(torch.cat([ours[n] for n in names[name]]), gradient, rtol=1e-9, atol=1e-10)


def test_encoder_block_is_torchs_encoder_layer():
    block = transformer_block(32, 4, grid=(3, 3)).double()
    randomize(block)
    layer, names = torch_layer(block, cross=False)
    x = torch.randn(3, 14, 32, dtype=torch.float64)
    lengths = torch.tensor([14, 9, 1])
    padded = torch.arange(14) >= lengths[:, None]
    weight = torch.randn_like(x) * ~padded[..., None]

    ours = block(x, intervals.padding(lengths, 14))
    theirs = layer(x, src_key_padding_mask=padded)
    close(ours[~padded], theirs[~padded])
    ours, theirs = gradients(block, (ours * weight).sum()), gradients(layer, (theirs * weight).sum())
    compare_gradients(block, ours, layer, theirs, names)


def test_decoder_block_is_torchs_decoder_layer():
    block = transformer_block(32, 4, cross=True).double()
    randomize(block)
    layer, names = torch_layer(block, cross=True)
    x, memory = torch.randn(3, 7, 32, dtype=torch.float64), torch.randn(3, 11, 32, dtype=torch.float64)
    lengths = torch.tensor([11, 5, 1])
    padded = torch.arange(11) >= lengths[:, None]
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    weight = torch.randn_like(x)

    kept = block.cross.keys_values(memory)
    ours = block(x, intervals.causal(7), memory=(kept, intervals.padding(lengths, 7)))
    theirs = layer(x, memory, tgt_mask=later, memory_key_padding_mask=padded)
    close(ours, theirs)
    ours, theirs = gradients(block, (ours * weight).sum()), gradients(layer, (theirs * weight).sum())
    compare_gradients(block, ours, layer, theirs, names)


@needs_torchvision
@pytest.mark.parametrize("stages", [3, 4])
@pytest.mark.parametrize("training", [False, True])
def test_conv_stage_is_torchvisions_resnet(training, stages):
    resnet = peers.load("torchvision.models.resnet")
    theirs = resnet.ResNet(resnet.Bottleneck, [1, 2, 2, 1]).double()
    randomize(theirs)
    absent = ("fc",) if stages == 4 else ("layer4", "fc")
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith(absent)}
    ours = ResNet((1, 2, 2, 1)[:stages], 64).double()
    ours.load_state_dict(state)  # strict: the names are torchvision's
    ours.train(training), theirs.train(training)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)

    expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)[:stages]:
        expected = stage(expected)
    out = ours(images)
    assert out.shape == (2, ours.channels, 64 // ours.stride, 96 // ours.stride)
    close(out, expected)
    weight = torch.randn_like(out)
    mine, other = gradients(ours, (out * weight).sum()), gradients(theirs, (expected * weight).sum())
    assert set(mine) == {name for name in other if not name.startswith(absent)}
    for name, gradient in mine.items():
        close(gradient, other[name], rtol=1e-8, atol=1e-8)
    close(ours.state_dict()["layer3.1.bn3.running_var"], theirs.state_dict()["layer3.1.bn3.running_var"])


def dense_bias(table, grid, length):  # [H, 2R-1, 2C-1] -> [H, length, length]
    """The relative bias entry by entry."""
    rows, columns = grid
    bias = table.new_zeros(table.shape[0], length, length)
    for i in range(rows * columns):
        for j in range(rows * columns):
            dr, dc = i // columns - j // columns, i % columns - j % columns
            bias[:, i, j] = table[:, dr + rows - 1, dc + columns - 1]
    return bias


def dense_attention(query, key, value, allowed, bias, heads):  # [B, T, D] each, [B, Tq, Tk] bool
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    mask = torch.zeros(allowed.shape, dtype=query.dtype).masked_fill(~allowed, -torch.inf)[:, None] + bias
    return F.scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)


def dense_block(block, x, allowed, bias=0.0, memory=None, memory_allowed=None):
    attn = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    x = x + attn.out_proj(dense_attention(*qkv, allowed, bias, attn.heads))
    if memory is not None:
        query, kv = block.cross.q_proj(block.ln_cross(x)), block.cross.kv_proj(memory).chunk(2, -1)
        x = x + block.cross.out_proj(dense_attention(query, *kv, memory_allowed, 0.0, attn.heads))
    return x + block.mlp(block.ln_2(x))


def dense_logits(model, images, tokens, prefix):
    """The model with masks and bias written out; rows before the prefix's last token are garbage or 0."""
    text = model.token_embedding(tokens) + model.text_position[: tokens.shape[1]]
    x = text if images is None else torch.cat([model.encode_image(images), text], 1)
    before, total = x.shape[1] - tokens.shape[1], x.shape[1]
    i, j, p = torch.arange(total)[:, None], torch.arange(total), (before + prefix)[:, None, None]
    biases = [
        0.0 if images is None else dense_bias(block.attn.relative_bias, model.config.grid, total)
        for block in model.encoder
    ]
    if model.config.form == "prefix_lm":
        allowed = (j < p) | (j <= i)
        for block, bias in zip(model.encoder, biases, strict=True):
            x = dense_block(block, x, allowed, bias)
        for block in model.decoder:
            x = dense_block(block, x, allowed)
        return F.linear(model.ln_final(x[:, before:]), model.token_embedding.weight)
    for block, bias in zip(model.encoder, biases, strict=True):
        x = dense_block(block, x, (j < p).expand(-1, total, -1), bias)
    memory = model.cross_norm(x)
    t = torch.arange(tokens.shape[1])
    allowed = (t <= t[:, None]) & ((t >= prefix[:, None, None] - 1) | (t == t[:, None]))
    for block in model.decoder:
        seen = (j < p).expand(-1, len(t), -1)
        text = dense_block(block, text, allowed, memory=memory, memory_allowed=seen)
    return F.linear(model.ln_final(text), model.token_embedding.weight)


@both_forms
@pytest.mark.parametrize("with_image", [True, False])
def test_logits_and_gradients_are_those_of_dense_masks_and_bias(form, with_image):
    model = tiny_model(form)
    images, tokens, lengths = tiny_batch()
    images = images if with_image else None
    prefix = torch.tensor([4, 1, 2, 3])
    out = model(images, tokens, prefix, lengths, return_logits=True)
    expected = dense_logits(model, images, tokens, prefix)
    t = torch.arange(tokens.shape[1])
    counted = (t >= prefix[:, None] - 1) & (t < lengths[:, None] - 1)  # rows that predict
    close(out["logits"][counted], expected[counted])
    # The loss is the mean over the suffix, position t predicting token t + 1.
    nll = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    loss = nll[counted[:, :-1].flatten()].mean()
    close(out["loss"], loss)
    close(model(images, tokens, prefix, lengths)["loss"], out["loss"])

    ours, theirs = gradients(model, out["loss"]), gradients(model, loss)
    image_part = ("conv_stage", "image_")
    assert (
        set(ours)
        == set(theirs)
        == {
            name
            for name, _ in model.named_parameters()
            if with_image or not (name.startswith(image_part) or "relative_bias" in name)
        }
    )
    for name, gradient in ours.items():
        close(gradient, theirs[name], rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    if with_image:
        assert ours["encoder.0.attn.relative_bias"].abs().min() > 0


def test_prefix_form_at_prefix_0_is_a_causal_language_model():
    model = tiny_model("prefix_lm")
    _, tokens, _ = tiny_batch()
    x = model.token_embedding(tokens) + model.text_position[: tokens.shape[1]]
    later = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=torch.float64)
    for block in (*model.encoder, *model.decoder):
        x = torch_layer(block, cross=False)[0](x, src_mask=later, is_causal=True)
    causal = F.linear(model.ln_final(x), model.token_embedding.weight)
    lengths = torch.full((len(tokens),), tokens.shape[1])
    for prefix in (0, 1, torch.zeros_like(lengths)):
        close(model(None, tokens, prefix, lengths, return_logits=True)["logits"], causal)
    longer = model(None, tokens, 3, lengths, return_logits=True)["logits"]
    assert (longer[:, 2] - causal[:, 2]).abs().max() > 1e-3


@both_forms
def test_a_later_token_never_changes_earlier_predictions_and_the_prefix_sees_itself(form):
    model = tiny_model(form)
    images, tokens, _ = tiny_batch()
    lengths = torch.full((4,), tokens.shape[1])
    prefix = torch.tensor([1, 2, 4, 5])
    t = torch.arange(tokens.shape[1])

    def logits(tokens, images=images):
        return model(images, tokens, prefix, lengths, return_logits=True)["logits"]

    base = logits(tokens)
    for changed in range(1, tokens.shape[1]):
        other = tokens.clone()
        other[:, changed] = (tokens[:, changed] + 5) % 31
        moved = (logits(other) - base).abs().amax(-1) > 1e-6  # [B, L]
        suffix = (t >= prefix[:, None] - 1) & (t < changed)
        in_prefix = changed < prefix[:, None]
        assert not (moved & suffix & ~in_prefix).any()
        assert moved[(t >= prefix[:, None] - 1) & ((t >= changed) | in_prefix)].all()
    assert ((logits(tokens, images.flip(0)) - base).abs().amax(-1) > 1e-6)[t >= prefix[:, None] - 1].all()


@both_forms
def test_loss_ignores_padding_and_neighbours(form):
    model = tiny_model(form)
    images, tokens, lengths = tiny_batch(size=3)
    prefix = torch.tensor([2, 1, 3])
    loss = model(images, tokens, prefix, lengths)["loss"]
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    close(model(images, tokens.masked_fill(padding, 17), prefix, lengths)["loss"], loss)
    close(model(images, tokens, prefix)["loss"], loss)  # the lengths are read off the end tokens
    counts = lengths - prefix
    rows = [
        model(images[i : i + 1], tokens[i : i + 1, : lengths[i]], int(prefix[i]))["loss"] for i in range(3)
    ]
    close(loss, (torch.stack(rows) * counts).sum() / counts.sum())


@both_forms
def test_one_prefix_length_for_all_equals_a_tensor_of_it(form):
    model = tiny_model(form)
    images, tokens, lengths = tiny_batch()
    lengths.clamp_(min=4)
    for prefix in (0, 1, 4):
        several = torch.full((4,), prefix)
        close(model(images, tokens, prefix, lengths), model(images, tokens, several, lengths))


@both_forms
def test_texts_without_anything_to_predict_cost_nothing(form):
    model = tiny_model(form)
    images, tokens, lengths = tiny_batch()
    loss = model(images, tokens, lengths, lengths)["loss"]
    assert loss == 0
    assert all(g.abs().max() == 0 for g in gradients(model, loss).values())


def test_sampled_prefixes_are_uniform_over_the_text():
    model = SimVLM(tiny_config())
    lengths = torch.tensor([2, 3, 8]).repeat_interleave(20000)
    generator = torch.Generator().manual_seed(1)
    drawn = model.sample_prefix(lengths, generator)
    assert torch.equal(drawn, model.sample_prefix(lengths, torch.Generator().manual_seed(1)))
    for length in (2, 3, 8):
        counts = drawn[lengths == length].bincount(minlength=length)
        assert counts[0] == 0
        assert len(counts) == length  # at least one token is left to predict
        share = counts[1:] / 20000
        assert (share - 1 / (length - 1)).abs().max() < 0.015
    assert torch.equal(model.sample_prefix(torch.tensor([1])), torch.tensor([1]))


@both_forms
def test_training_draws_a_new_prefix_each_time(form):
    model = tiny_model(form)
    images, tokens, lengths = tiny_batch()
    losses = {model(images, tokens, text_lengths=lengths)["loss"].item() for _ in range(6)}
    assert len(losses) > 1
    torch.manual_seed(3)
    drawn = model.sample_prefix(lengths)
    torch.manual_seed(3)
    close(model(images, tokens, text_lengths=lengths), model(images, tokens, drawn, lengths))


def test_stochastic_depth_drops_branches_of_whole_samples_in_conv_stage_and_encoder():
    model = SimVLM(tiny_config(stochastic_depth=0.5)).double()
    randomize(model)
    assert {m.stochastic_depth for m in model.conv_stage.modules() if hasattr(m, "stochastic_depth")} == {0.5}
    assert {b.stochastic_depth for b in model.decoder} == {0.0}
    block, x = model.encoder[0], torch.randn(64, 5, 32, dtype=torch.float64)
    interval = intervals.causal(5)
    attention, mlp = block.attn(block.ln_1(x), interval), lambda y: block.mlp(block.ln_2(y))
    dropped = block.train()(x, interval)
    candidates = [x, x + 2 * attention, x + 2 * mlp(x), x + 2 * attention + 2 * mlp(x + 2 * attention)]
    distance = torch.stack([(dropped - c).abs().amax((1, 2)) for c in candidates])  # [4, 64]
    assert distance.amin(0).max() < 1e-9
    assert (distance.argmin(0).bincount(minlength=4) >= 4).all()  # 16 expected of each


@both_forms
def test_dropout_acts_in_training_only(form):
    model = tiny_model(form, dropout=0.1, stochastic_depth=0.1)
    plain = SimVLM(dataclasses.replace(model.config, dropout=0.0, stochastic_depth=0.0)).double().eval()
    plain.load_weights(model.state_dict())
    batch = tiny_batch()
    close(model(*batch[:2], 1)["loss"], plain(*batch[:2], 1)["loss"])
    losses = {model.train()(*batch[:2], 1)["loss"].item() for _ in range(3)}
    assert len(losses) == 3


@both_forms
def test_autocast_trains_close_to_float32(form):
    model = tiny_model(form).float()
    images, tokens, lengths = tiny_batch()
    args = images.float(), tokens, 1, lengths
    expected = model(*args)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*args)["loss"]
    assert loss.dtype == torch.float32
    close(loss, expected, rtol=0.03, atol=0)
    assert all(g.isfinite().all() for g in gradients(model, loss).values())


@pytest.mark.parametrize("cross", [False, True])
def test_block_compiles_as_one_graph(cross):
    block = transformer_block(32, 4, grid=None if cross else (3, 3), cross=cross)
    randomize(block)

    def step(x, memory, lengths):
        if cross:
            kept = block.cross.keys_values(memory), intervals.padding(lengths, x.shape[1])
            return block(x, intervals.causal(x.shape[1]), memory=kept)
        return block(x, intervals.prefix_lm(lengths, x.shape[1]), has_image=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=not cross, backend="aot_eager")
    args = torch.randn(2, 12, 32), torch.randn(2, 11, 32), torch.tensor([10, 11])
    out, expected = compiled(*args), step(*args)
    close(out, expected)
    ours = gradients(block, out.square().sum())
    for name, gradient in gradients(block, expected.square().sum()).items():
        close(ours[name], gradient, rtol=1e-4, atol=1e-4)


@both_forms
def test_it_learns_captions_from_images(form):
    torch.manual_seed(5)
    model = SimVLM(tiny_config(form, vocab_size=12, context_length=6))
    images = torch.randn(6, 3, 24, 24)
    tokens = torch.cat([torch.ones(6, 1), torch.randint(3, 12, (6, 3)), torch.full((6, 1), 2)], 1).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(images, tokens)["loss"].backward()
        optimizer.step()
    assert torch.equal(model.eval().generate(images, max_new_tokens=4), tokens[:, 1:])
