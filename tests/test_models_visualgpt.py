"""VisualGPT against its equations in float64, GPT-2 of transformers, and decoding without a cache."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from tests.simvlm_tiny import randomize
from vlmkernels.models.decoder import CausalLM, DecoderConfig
from vlmkernels.models.visualgpt import CONFIGS, VisualDecoding, VisualGPT, VisualGPTConfig

close = torch.testing.assert_close
REGIONS = VisualGPTConfig(
    region_width=10, width=24, encoder_layers=3, encoder_mlp_width=32, layers=2, heads=3, context_length=12,
    vocab_size=31, start_id=1, end_id=2, pad_id=0, dropout=0.0, cross_dropout=0.0,
)  # fmt: skip
PIXELS = dataclasses.replace(
    REGIONS, image_size=16, conv_blocks=(1, 1), conv_width=4, conv_pool=False, encoder_layers=2
)


def tiny(config=REGIONS, **fields):
    model = VisualGPT(dataclasses.replace(config, **fields))
    randomize(model)
    return model.double().eval()


def batch(config=REGIONS, rows=4, length=9, texts=1):
    """Images, of which the second has padding, and texts of several lengths."""
    if config.image_size is not None:
        images = torch.randn(rows, 3, 16, 16, dtype=torch.float64)
    else:
        images = torch.randn(rows, 6, config.region_width, dtype=torch.float64)
        images[1, 4:] = 0
    tokens = torch.randint(3, 31, (rows * texts, length))
    tokens[:, 0] = 1
    lengths = length - torch.arange(rows * texts) % (length - 3)
    return images, tokens.masked_fill(torch.arange(length) >= lengths[:, None], 0)


def composed(weights, regions, tokens, *, levels, heads, tau, mask=None, pad=0):
    """Logits by the equations of the paper and its code, with weights by the names of the latter."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def conv1d(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(q, k, v, hidden, fill):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        return (scores.masked_fill(hidden, fill).softmax(-1) @ v).transpose(1, 2).flatten(2)

    x = norm(gelu(linear(regions, "encoder.fc")), "encoder.layer_norm")
    padding = (regions == 0).all(-1) if mask is None else mask
    outs = []
    for i in range(levels):
        place = f"encoder.layers.{i}"
        q, k, v = (linear(x, f"{place}.mhatt.attention.fc_{n}") for n in "qkv")
        mixed = attention(q, k, v, padding[:, None, None], -math.inf)
        x = norm(x + linear(mixed, f"{place}.mhatt.attention.fc_o"), f"{place}.mhatt.layer_norm")
        fed = linear(linear(x, f"{place}.pwff.fc1").relu(), f"{place}.pwff.fc2")
        x = norm(x + fed, f"{place}.pwff.layer_norm")
        outs.append(x)

    length = tokens.shape[1]
    kept = (tokens != pad)[..., None]
    causal = torch.ones(length, length).triu(1).bool() | (tokens == pad)[:, None, None]
    place = "decoder.transformer"
    x = weights[f"{place}.wte.weight"][tokens] + weights[f"{place}.wpe.weight"][:length]
    for i in range(sum(name.endswith(".ln_2.bias") for name in weights)):
        block = f"{place}.h.{i}"
        qkv = conv1d(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, -1)
        a = x + conv1d(attention(*qkv, causal, -1e4), f"{block}.attn.c_proj")
        total, cross = 0, f"{block}.enc_dec_attn"
        for level, out in enumerate(outs):
            memory = norm(out, f"{block}.ln_1")
            q = linear(norm(a, f"{block}.ln_1"), f"{cross}.fc_q")
            k, v = (linear(memory, f"{cross}.fc_{n}") for n in "kv")
            e = conv1d(attention(q, k, v, padding[:, None, None], -1e4), f"{cross}.c_proj")
            gate = linear(torch.cat([a, e], -1), f"{block}.fc_alpha{level + 1}").sigmoid()
            total = total + gate * (gate > tau) * a + (1 - gate) * (gate < 1 - tau) * e
        r = total / math.sqrt(levels) * kept
        fed = conv1d(gelu(conv1d(norm(r, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
        x = (r + fed) * kept
    return norm(x, f"{place}.ln_f") @ weights["decoder.lm_head.decoder.weight"].T


def nll(logits, tokens):
    targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == 0, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)


@pytest.mark.parametrize("tau", [0.0, 0.2])
@pytest.mark.parametrize("strict", [False, True])
def test_outputs_loss_and_every_gradient_are_those_of_the_equations(tau, strict):
    model = tiny(tau=tau, strict_compat=strict)
    images, tokens = batch()
    weights = {name: x.detach().clone() for name, x in model.original_state_dict().items()}
    trained = {name: x.requires_grad_() for name, x in weights.items() if x.is_floating_point()}
    trained["decoder.lm_head.decoder.weight"] = trained["decoder.transformer.wte.weight"]
    mask = None
    if strict:  # of the normalised features, as rounding has it
        mask = ~model.encode(images).mask
    logits = composed(trained, images, tokens, levels=3, heads=3, tau=tau, mask=mask)
    loss = nll(logits, tokens)
    loss.backward()
    output = model(images, tokens, return_logits=True)
    output["loss"].backward()
    rows = tokens != 0
    close(output["logits"][rows], logits[rows])
    if strict:
        close(output["logits"], logits)
    close(output["loss"], loss)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    for name, grad in model.original_state_dict().items():
        if name in trained and trained[name].grad is not None:
            close(grad, trained[name].grad, msg=lambda text, n=name: f"{n}: {text}")


def test_the_default_mask_is_that_of_the_features_and_the_authors_that_of_rounding():
    images, _ = batch()
    assert tiny().encode(images).mask.tolist() == [[True] * 6, [True] * 4 + [False] * 2, *[[True] * 6] * 2]
    found = tiny(strict_compat=True).float().encode(images.float()).mask
    assert found.shape == (4, 6)
    assert not torch.equal(found, tiny().encode(images).mask)


@pytest.mark.parametrize("strict", [False, True])
def test_an_image_without_regions(strict):
    """Its texts attend to nothing; in the authors' code, here with the right mask, to the padding evenly."""
    model = tiny(strict_compat=strict)
    images, tokens = batch()
    images[2] = 0
    regions = model.encode(images)
    if strict:
        regions = regions._replace(mask=(images != 0).any(-1))
    block = model.blocks[0]
    x = torch.randn(4, 5, 24, dtype=torch.float64)
    memory = block.keys_values(regions)
    e = block.cross(x, memory, regions)
    value = memory[1].unflatten(1, (3, 3))[2].mean(2).flatten(1)  # [L, D] mean over the regions
    expected = block.cross.out_proj(value if strict else torch.zeros_like(value))
    close(e[:, 2], expected[:, None].expand(-1, 5, -1))
    assert model(images, tokens)["loss"].isfinite()


def test_state_dict_of_the_authors_both_ways(tmp_path):
    model = tiny()
    original = model.original_state_dict()
    assert original["decoder.transformer.h.0.attn.c_attn.weight"].shape == (24, 72)
    assert original["decoder.transformer.h.1.fc_alpha3.weight"].shape == (24, 48)
    assert original["decoder.transformer.h.1.attn.bias"].shape == (1, 1, 60, 60)
    fields = {"heads": 3, "start_id": 1, "end_id": 2, "pad_id": 0, "dropout": 0.0, "cross_dropout": 0.0}
    again = VisualGPT.from_original_state_dict(original, **fields)
    assert again.config == model.config
    close(dict(again.state_dict()), {name: tensor.float() for name, tensor in model.state_dict().items()})
    torch.save(original, tmp_path / "visualgpt.pth")
    assert VisualGPT.from_original_state_dict(tmp_path / "visualgpt.pth", **fields).config == model.config
    broken = {**original, "decoder.strange": torch.zeros(1)}
    del broken["encoder.layers.0.pwff.fc1.bias"]
    with pytest.raises(ValueError, match=r"(?s)1 missing: encoder.*fc1.bias; 1 unknown: decoder.strange"):
        VisualGPT.from_original_state_dict(broken, **fields)
    with pytest.raises(ValueError, match="from_original_state_dict"):
        model.load_weights(original)
    model.save_pretrained(tmp_path / "ours")
    read = VisualGPT.from_pretrained(tmp_path / "ours").state_dict()
    close(dict(read), {name: tensor.float() for name, tensor in model.state_dict().items()})


def test_with_open_gates_it_is_gpt2():
    """One level, whose gates are 1: r = a, and the decoder is the GPT-2 that it starts from."""
    if why := peers.why_not("transformers"):
        pytest.skip(f"transformers: {why}")
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 31, "n_positions": 12, "n_embd": 24, "n_layer": 2, "n_head": 3}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    randomize(theirs)
    language = CausalLM.from_hf_state_dict(theirs.state_dict(), heads=3)
    model = VisualGPT.from_language_model(
        language, region_width=10, encoder_layers=1, start_id=1, end_id=2, pad_id=0
    )
    for block in model.blocks:
        torch.nn.init.zeros_(block.gate_text.weight)
        torch.nn.init.zeros_(block.gate_visual[0].weight)
        torch.nn.init.constant_(block.gate_text.bias, 100.0)
    images, tokens = batch()
    tokens = tokens.clamp_min(1)
    model, theirs = model.double().eval(), theirs.double()
    close(model(images, tokens, return_logits=True)["logits"], theirs(tokens).logits)
    new = model.generate(images, tokens[:, :3], max_new_tokens=5, eos_token_id=2)
    expected = theirs.generate(
        tokens[:, :3], max_new_tokens=5, eos_token_id=2, pad_token_id=0, do_sample=False
    )[:, 3:]
    assert torch.equal(new, expected)


def test_a_language_model_that_does_not_fit():
    language = CausalLM(DecoderConfig(vocab_size=31, width=24, heads=3, layers=1, eps=1e-6))
    with pytest.raises(ValueError, match=r"(?s)eps .* 1e-5, got 1e-06; layers .* 1, got 2"):
        VisualGPT.from_language_model(language, layers=2)


@pytest.mark.parametrize("config", [REGIONS, PIXELS], ids=["regions", "pixels"])
@pytest.mark.parametrize("fields", [{}, {"fusion": "residual"}, {"strict_compat": True}], ids=str)
def test_cached_decoding_gives_the_logits_of_all_tokens(config, fields):
    model = tiny(config, **fields)
    images, tokens = batch(config)
    tokens = tokens.clamp_min(1)
    with torch.no_grad():
        whole = model(images, tokens, return_logits=True)["logits"]
        session = VisualDecoding(model, images, tokens[:, :2])
        close(session.first_logits, whole[:, 1])
        for t in (2, 3):
            logits, hidden = session.step(tokens[:, t], return_hidden=True)
            close(logits, whole[:, t])
            close(hidden @ model.transformer["wte"].weight.T, logits)
        session.reorder(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))  # beams of an image share its keys
        assert len(session.memory[0][0]) == 4
        close(session.step(tokens[:, 4].repeat_interleave(2)), whole[:, 4].repeat_interleave(2, 0))
        rows = torch.tensor([6, 1, 3])
        session.reorder(rows)  # any rows at all
        close(session.step(tokens[rows // 2, 5]), whole[rows // 2, 5])


def test_several_texts_of_an_image_are_read_as_with_the_image_each():
    model = tiny()
    images, tokens = batch(texts=3)
    together = model(images, tokens, per_token=True)["loss"]
    apart = model(images.repeat_interleave(3, 0), tokens, per_token=True)["loss"]
    close(together, apart)
    counted = (tokens != 0) & (torch.arange(9) > 0)
    close(together.sum() / counted.sum(), model(images, tokens)["loss"])
    assert (together[~counted] == 0).all()


def test_beam_search_finds_what_an_exhaustive_search_finds():
    model = tiny(vocab_size=5, pad_id=2, start_id=1, end_id=2)
    images = batch(rows=2)[0][:2]
    got = model.generate(images, max_new_tokens=3, num_beams=60, length_penalty=0.0)
    words = (0, 1, 3, 4)
    texts = [(*text, 2) for n in (0, 1, 2) for text in itertools.product(words, repeat=n)]
    texts += list(itertools.product(words, repeat=3))
    rows = torch.tensor([(1, *text, *[2] * (3 - len(text))) for text in texts])
    counted = torch.arange(4) <= torch.tensor([[len(text)] for text in texts])
    labels = rows.masked_fill(~counted, -100).repeat(2, 1)
    nll = model(images, rows.repeat(2, 1), labels, per_token=True)["loss"].sum(1)
    for row, best in zip(got.tolist(), nll.view(2, -1).argmin(1).tolist(), strict=True):
        assert tuple(row[: len(texts[best])]) == texts[best]


def test_dropout_acts_in_training_alone():
    model = tiny(dropout=0.3, cross_dropout=0.3)
    images, tokens = batch()
    assert model(images, tokens)["loss"] == model(images, tokens)["loss"]
    model.train()
    losses = {model(images, tokens)["loss"].item() for _ in range(3)}
    assert len(losses) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(4, 3, 16, 16)},
            r"floating \[B, N, 10\] of regions, got torch.float32 \[4, 3,",
        ),
        ({"images": torch.zeros(3, 6, 10)}, "as many rows as images, or a multiple of them, got 4 and 3"),
        ({"tokens": torch.ones(4, 13, dtype=torch.int64)}, "1 to context_length 12 columns, got 13"),
        ({"tokens": torch.ones(4, 5)}, r"tokens must be int64 \[B, T\], got torch.float32"),
        ({"labels": torch.ones(4, 5)}, r"labels must be int64 \[4, 9\]"),
    ],
)
def test_bad_input(change, message):
    images, tokens = batch()
    given = {"images": images.float(), "tokens": tokens} | change
    with pytest.raises(ValueError, match=message):
        tiny().float()(**given)


def test_bad_config():
    with pytest.raises(ValueError, match=r"(?s)width must be at least 1.*fusion.*orientation.*tau.*pad_id"):
        VisualGPTConfig(width=0, fusion="sum", orientation="", tau=0.7, pad_id=-1)
    with pytest.raises(ValueError, match="image_size must be a multiple of 32, got 100"):
        VisualGPTConfig(image_size=100)
    assert {name: config.image_size for name, config in CONFIGS.items()} == {
        "visualgpt": None, "visualgpt-resnet50": 224, "emoji-tiny": 48
    }  # fmt: skip
