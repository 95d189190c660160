"""VirTex against a composition of torch's own layers: outputs, losses, every gradient, weights, decoding."""

import itertools

import pytest
import torch

from tests.parity import close
from tests.simvlm_tiny import randomize
from tests.virtex_tiny import VOCABULARY, TorchVirTex, tiny_batch, tiny_config, tiny_model
from vlmkernels import ops
from vlmkernels.models import virtex
from vlmkernels.models.parts.generation import generate
from vlmkernels.models.virtex import CONFIGS, TASKS, VirTex, VirTexConfig

LENGTHS = torch.tensor([9, 5, 9, 6])
FORMS = [(task, {}) for task in TASKS] + [
    ("bicaptioning", {"pre_norm": True}),
    ("bicaptioning", {"conv_widen": 2, "conv_blocks": (1, 2), "conv_pool": True}),
]


def masked(tokens):
    """Tokens with some replaced, and the labels."""
    labels = torch.full_like(tokens, -100)
    for row, place in ((0, 2), (0, 5), (2, 4), (3, 3)):
        labels[row, place], tokens[row, place] = tokens[row, place], 3
    return tokens, labels


def composition(model):
    """The composition with the weights of a model, which it must take under its own names."""
    theirs = TorchVirTex(model.config).double()
    theirs.load_state_dict(model.original_state_dict())
    return theirs.train(model.training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("task", "fields"), FORMS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_logits_loss_and_every_gradient_are_those_of_the_composition(task, fields, training):
    torch.manual_seed(0)
    model = tiny_model(task, **fields).train(training)
    theirs = composition(model)
    images, tokens = tiny_batch()
    labels = None
    if task == "masked_lm":
        tokens, labels = masked(tokens)
    out = model(images.requires_grad_(), tokens, labels, return_logits=True)
    out["loss"].backward()
    found = [images.grad, {n: p.grad for n, p in model.named_parameters()}]
    images.grad = None
    loss, logits = theirs(images, tokens, LENGTHS, labels)
    loss.backward()
    close(out["loss"], loss, "loss", 1e-12)
    real = torch.arange(9) < LENGTHS[:, None] if task != "token_classification" else slice(None)
    for name, wanted in zip(("logits", "backward_logits"), logits, strict=False):
        close(out[name][real], wanted[real], name)
    assert ("backward_logits" in out) == (task == "bicaptioning")
    close(found[0], images.grad, "gradient of images")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert found[1][name] is not None, name
            parameter.copy_(found[1][name])
    gradients = model.original_state_dict()
    for name, parameter in theirs.named_parameters():
        close(gradients[name], parameter.grad, f"gradient of {name}")


def test_both_directions_are_one_call(monkeypatch):
    model = tiny_model()
    images, tokens = tiny_batch()
    calls = []
    original = ops.linear_cross_entropy

    def counting(hidden, *arguments, **options):
        calls.append(hidden.shape)
        return original(hidden, *arguments, **options)

    monkeypatch.setattr(virtex.vlmkernels, "linear_cross_entropy", counting)
    both = model(images, tokens)["loss"]
    forward = model(images, tokens, forward_only=True)["loss"]
    assert calls == [(8, 9, 24), (4, 9, 24)]
    assert both > forward > 0


def test_reversed_captions():
    _, tokens = tiny_batch()
    found = virtex.reverse(tokens, tiny_model().text_lengths(tokens))
    assert found[1].tolist() == [2, 14, 13, 12, 1, 0, 0, 0, 0]
    assert found[2].tolist() == [15, 22, 21, 4, 9, 20, 7, 7, 1]
    assert found[3].tolist() == [2, 16, 17, 0, 16, 1, 0, 0, 0]


def test_each_direction_has_weights_of_its_own_that_start_equal():
    model = VirTex(tiny_config())
    forward, backward = model.decoder.state_dict(), model.backward_decoder.state_dict()
    assert all(value.equal(backward[name]) for name, value in forward.items())
    assert not {p.data_ptr() for p in model.decoder.parameters()} & {
        p.data_ptr() for p in model.backward_decoder.parameters()
    }
    assert 0.019 < model.embedding.words.weight[1:].std() < 0.021
    assert not model.embedding.words.weight[0].any()


@pytest.mark.parametrize(
    ("task", "count"),
    [("bicaptioning", 370), ("captioning", 344), ("masked_lm", 344), ("token_classification", 320)],
)
def test_published_layout(task, count):
    """Names and shapes of a published model, of a file with it, and back; no memory for the weights."""
    config = VirTexConfig(task=task)
    with torch.device("meta"):
        ours, theirs = VirTex(config).original_state_dict(), TorchVirTex(config).state_dict()
    assert len(ours) == count
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}


@pytest.mark.parametrize(("task", "fields"), FORMS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_original_weights_load_from_a_file_and_come_back(tmp_path, task, fields):
    model = tiny_model(task, **fields).float()
    weights = TorchVirTex(model.config).state_dict()
    torch.save({"model": weights, "iteration": 500000}, tmp_path / "checkpoint.pth")
    given = {"task": task, **fields} | ({} if task == "token_classification" else {"heads": 3})
    loaded = VirTex.from_original_state_dict(tmp_path / "checkpoint.pth", **given)
    assert not loaded.training
    back = loaded.original_state_dict()
    assert back.keys() == weights.keys()
    assert all(value.equal(weights[name]) for name, value in back.items())
    for name in ("conv_blocks", "conv_width", "conv_widen", "vocab_size", "pre_norm"):
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    folder = tmp_path / "saved"
    loaded.save_pretrained(folder)
    again = VirTex.from_pretrained(folder).state_dict()
    assert all(value.equal(again[name]) for name, value in loaded.state_dict().items())


def test_weights_that_are_no_virtex_are_refused():
    weights = TorchVirTex(tiny_config()).state_dict()
    with pytest.raises(ValueError, match=r"no key 'visual.cnn.conv1.weight'"):
        VirTex.from_original_state_dict({n: v for n, v in weights.items() if "conv1" not in n})
    other = {"backward_textual.embedding.words.weight": torch.ones(VOCABULARY, 24)}
    with pytest.raises(ValueError, match=r"backward_textual.embedding.words.weight must equal"):
        VirTex.from_original_state_dict({**weights, **other})
    with pytest.raises(ValueError, match="1 unknown: extra"):
        VirTex.from_original_state_dict({**weights, "extra": torch.zeros(1)}, heads=3)
    name = "backward_textual.transformer.layers.0.self_attn.in_proj_weight"
    without = {n: v for n, v in weights.items() if n != name}
    with pytest.raises(ValueError, match=r"missing: backward_decoder.layers.0.attn.in_proj_weight"):
        VirTex.from_original_state_dict(without, heads=3)


def test_published_sizes():
    sizes = {name: (c.width, c.layers, c.heads) for name, c in CONFIGS.items()}
    assert sizes["bicaptioning_R_50_L1_H2048"] == (2048, 1, 32)
    assert sizes["bicaptioning_R_50_L4_H1024"] == (1024, 4, 16)
    with torch.device("meta"):
        model = VirTex(CONFIGS["bicaptioning_R_50_L1_H1024"])
        wide = VirTex(CONFIGS["bicaptioning_R_50W2X_L1_H1024"])
    assert sum(p.numel() for p in model.parameters()) == 69_482_320
    assert wide.visual.layer4[0].conv2.weight.shape == (1024, 1024, 3, 3)


def test_captions_padded_with_their_end():
    """The house's tokenizer pads with the end of text: the first end counts, the others do not."""
    fields = {"pad_id": 2}
    model = tiny_model(**fields)
    images, tokens = tiny_batch()
    tokens[3, 2] = 18
    padded = tokens.masked_fill(tokens == 0, 2)
    assert model.text_lengths(padded).tolist() == LENGTHS.tolist()
    other = tiny_model()
    other.load_state_dict(model.state_dict())
    close(model(images, padded)["loss"], other(images, tokens)["loss"], "loss")


def test_padding_costs_nothing_and_changes_nothing():
    model = tiny_model().eval()
    images, tokens = tiny_batch()
    short = model(images[1:2], tokens[1:2, :5], return_logits=True)
    long = model(images[1:2], tokens[1:2], return_logits=True)
    close(short["loss"], long["loss"], "loss")
    close(short["logits"], long["logits"][:, :5], "logits")


def test_dropout_is_of_every_place():
    """Attention probabilities, hidden layer, sublayers and embeddings; none outside of training."""
    torch.manual_seed(0)
    model = tiny_model(dropout=0.3)
    images, tokens = tiny_batch()
    plain = tiny_model()
    plain.load_state_dict(model.state_dict())
    assert model.eval()(images, tokens)["loss"].equal(plain.eval()(images, tokens)["loss"])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    model.train()
    assert not model(images, tokens)["loss"].equal(model(images, tokens)["loss"])
    layer, x = model.decoder.layers[0], torch.randn(4, 9, 24, dtype=torch.float64)
    layer.dropout = 0.0
    memory = torch.randn(4, 5, 24, dtype=torch.float64)
    for part in (layer.attn, layer.cross, layer.mlp):
        rates = [other.dropout for other in (layer.attn, layer.cross, layer.mlp)]
        assert rates == [0.3] * 3
        for other in (layer.attn, layer.cross, layer.mlp):
            other.dropout = 0.3 if other is part else 0.0
        seen = virtex.intervals.causal(9)
        first, second = (layer(x, seen, memory=(memory, virtex.intervals.full(9, 5))) for _ in range(2))
        assert not first.equal(second)
        for other in (layer.attn, layer.cross, layer.mlp):
            other.dropout = 0.3
    for other in (layer.attn, layer.cross, layer.mlp):
        other.dropout = 0.0
    first, second = (layer(x, seen, memory=(memory, virtex.intervals.full(9, 5))) for _ in range(2))
    assert first.equal(second)


def test_causal_mask_under_dropout_is_the_same_as_without():
    """Training with dropout attends by a dense mask: with a tiny rate it shows that it is the intervals'."""
    model = tiny_model(dropout=1e-12)
    plain = tiny_model()
    plain.load_state_dict(model.state_dict())
    images, tokens = tiny_batch()
    close(model(images, tokens)["loss"], plain(images, tokens)["loss"], "loss", 1e-9)
    other = tokens.clone()
    other[:, 8] = 19
    logits = [model(images, ids, return_logits=True)["logits"][0, :8] for ids in (tokens, other)]
    close(*logits, "logits before the change", 1e-9)


def test_decoding_steps_are_the_forward_pass():
    model = tiny_model(layers=3).eval()
    images, _ = tiny_batch()
    tokens = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12]]).expand(4, -1)
    wanted = model(images, tokens, return_logits=True, forward_only=True)["logits"]
    decoding = virtex._Decoding(model, images)
    close(decoding.read(tokens[:, :3]), wanted[:, 2], "prefix")
    decoding.reorder(torch.tensor([2, 0, 1, 3, 3]))
    rows = wanted[[2, 0, 1, 3, 3]]
    for place in range(3, 9):
        close(decoding.step(tokens[:1, place].expand(5)), rows[:, place], f"token {place}")


def log_probabilities(model, image, captions, repeated):
    """Of every caption, all of one length when their padding is counted as 0."""
    steps = max(map(len, captions))
    tokens = torch.tensor([[1, *caption, *[0] * (steps - len(caption))] for caption in captions])
    shown = image[None].expand(len(tokens), -1, -1, -1)
    logits = model(shown, tokens, forward_only=True, return_logits=True)["logits"][:, :-1]
    each = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    if repeated is not None:
        each[:, 1:].masked_fill_(tokens[:, 2:] == tokens[:, 1:-1], repeated)
    inside = torch.arange(steps) < torch.tensor([len(caption) for caption in captions])[:, None]
    return (each * inside).sum(1)


@pytest.mark.parametrize("repeated", [None, -10000.0])
def test_beam_search_is_an_exhaustive_search_when_wide_enough(repeated):
    """The most likely of all captions of up to 3 tokens over 5 ids."""
    torch.manual_seed(1)
    steps = 3
    model = tiny_model("captioning", vocab_size=6, pad_id=0).eval()
    with torch.no_grad():
        model.output_bias.add_(torch.tensor([-50.0, -1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    images = 3 * torch.randn(3, 3, 32, 32, dtype=torch.float64)
    captions = [
        caption
        for length in range(1, steps + 1)
        for caption in itertools.product(range(1, 6), repeat=length)
        if 2 not in caption[:-1] and (length == steps or caption[-1] == 2)
    ]
    options = {"candidates_per_beam": None, "repeated_log_probability": repeated, "max_new_tokens": steps}
    found = model.generate(images, num_beams=130, **options)
    with torch.no_grad():
        best = [captions[int(log_probabilities(model, i, captions, repeated).argmax())] for i in images]
    for row, caption in zip(found.tolist(), best, strict=True):
        assert tuple(row[: len(caption)]) == caption
        assert not any(row[len(caption) :])
    narrow = model.generate(images, num_beams=1, **options)
    assert narrow.shape != found.shape or not narrow.equal(found)


def original_beam_search(step, batch, beams, per_node, steps, end):
    """The search of kdexd/virtex (that of AllenNLP): ended beams stay among the others."""
    first = step(torch.ones(batch, 1, dtype=torch.int64), 1)
    scores, tokens = first.topk(beams)
    captions = tokens[..., None]  # [B, K, 1]
    for _ in range(steps - 1):
        last = captions[:, :, -1].flatten()
        if (last == end).all():
            break
        rows = torch.cat([torch.ones(batch * beams, 1, dtype=torch.int64), captions.flatten(0, 1)], 1)
        each = step(rows, beams)
        each[torch.arange(batch * beams), last] = -10000.0
        stop = torch.full_like(each, -torch.inf)
        stop[:, end] = 0.0
        best, ids = torch.where((last == end)[:, None], stop, each).topk(per_node)
        totals = (best.view(batch, beams, per_node) + scores[..., None]).flatten(1)
        scores, kept = totals.topk(beams)
        grown = torch.cat([captions.repeat_interleave(per_node, 1), ids.view(batch, -1, 1)], 2)
        captions = grown.gather(1, kept[..., None].expand(-1, -1, grown.shape[2]))
    return captions[:, 0]


def test_default_decoding_is_the_originals():
    """Five beams of two continuations: the original's captions, or better ones, as it keeps what has ended
    among its five; no token follows itself.
    """
    torch.manual_seed(3)
    model = VirTex(tiny_config("captioning"))
    randomize(model, 2.0)
    model = model.double().eval()
    images = 3 * torch.randn(12, 3, 32, 32, dtype=torch.float64)

    def step(rows, beams):
        shown = images.repeat_interleave(beams, 0)
        out = model(shown, rows, forward_only=True, return_logits=True)
        return out["logits"][:, -1].float().log_softmax(-1)

    with torch.no_grad():
        wanted = original_beam_search(step, 12, 5, 2, 8, 2)
    found, equal = model.generate(images), 0
    for image, row, other in zip(images, found.tolist(), wanted.tolist(), strict=True):
        ours, theirs = (tuple(r[: r.index(2) + 1] if 2 in r else r) for r in (row, other))
        assert all(a != b for a, b in itertools.pairwise(ours))
        with torch.no_grad():
            scores = log_probabilities(model, image, [ours, theirs], -10000.0)
        assert ours == theirs or scores[0] > scores[1]
        equal += ours == theirs
    assert equal >= 10
    assert len({tuple(row) for row in found.tolist()}) >= 10


def test_candidates_of_a_beam():
    """With one candidate a beam goes on greedily, which misses the best continuation."""
    torch.manual_seed(4)
    table = 2 * torch.randn(5, 5)

    def run(**options):
        return generate(
            table[:1],
            lambda tokens: table[tokens],
            lambda rows: None,
            max_new_tokens=3,
            num_beams=3,
            **options,
        ).tolist()

    assert run(candidates_per_beam=1) != run(candidates_per_beam=5)
    assert run(candidates_per_beam=5) == run() == run(candidates_per_beam=99)


def test_nucleus_sampling():
    model = tiny_model("captioning").eval()
    images, _ = tiny_batch()
    nucleus = {"num_beams": 1, "do_sample": True, "top_p": 0.9}

    def draw(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(images, generator=generator, **nucleus, **options).tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    for row in itertools.chain(*(draw(seed) for seed in range(5))):
        words = row[: row.index(2)] if 2 in row else row
        assert all(a != b for a, b in itertools.pairwise(words))
    assert draw(0, top_k=1) == model.generate(images, num_beams=1).tolist()


def test_features():
    model = tiny_model().eval()
    images, _ = tiny_batch()
    grid = model.grid_features(images)
    assert grid.shape == (4, 128, 2, 2)
    close(model.features(images), grid.mean((2, 3)), "features")
    assert model.encode_image(images).shape == (4, 4, 24)
    assert model.features(torch.randn(1, 3, 50, 70, dtype=torch.float64)).shape == (1, 128)


def test_invalid_calls_name_every_argument():
    model = tiny_model()
    images, tokens = tiny_batch()
    labels = tokens.clone()
    faults = [
        ((images, tokens.float()), {}, r"tokens must be integer ids \[B, L\], got torch.float32 of shape"),
        ((images[:3], tokens.repeat(1, 2)), {}, "context_length 9 columns, got 18; images and tokens must"),
        ((images, tokens, labels), {}, "labels must be given for task 'masked_lm' and for no other, got"),
        ((images, tokens, labels[:2]), {}, r"labels must be int64 \[4, 9\] like tokens"),
        ((images[:, :2], tokens), {}, r"images must be floating \[B, 3, H, W\]"),
    ]
    for arguments, options, message in faults:
        with pytest.raises(ValueError, match=message):
            model(*arguments, **options)
    with pytest.raises(ValueError, match="forward_only is for tasks"):
        tiny_model("masked_lm")(images, tokens, labels, forward_only=True)
    with pytest.raises(ValueError, match="labels must be given for task 'masked_lm'"):
        tiny_model("masked_lm")(images, tokens)
    with pytest.raises(ValueError, match=r"generate: task must be one of .*, got 'masked_lm'"):
        tiny_model("masked_lm").generate(images)
    with pytest.raises(ValueError, match=r"max_new_tokens must be in \[1, 8\] after the prefix, got 9"):
        model.generate(images, max_new_tokens=9)
    with pytest.raises(ValueError, match="candidates_per_beam must be at least 1 or None, got 0"):
        model.generate(images, candidates_per_beam=0)
    with pytest.raises(ValueError, match=r"repeated_log_probability must be at most 0 or None, got 1.0"):
        model.generate(images, repeated_log_probability=1.0)
    with pytest.raises(ValueError, match="encode_image: task must be one of"):
        tiny_model("token_classification").encode_image(images)


def test_invalid_configs_name_every_field():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        VirTexConfig(width=0)
    with pytest.raises(ValueError) as error:
        VirTexConfig(task="reading", heads=3, eos_id=10000, dropout=1.0)
    for text in (
        "task must be one of",
        "heads must be a divisor of width 1024, got 3",
        "eos_id must be an id below 10000, got 10000",
        r"dropout must be in [0, 1), got 1.0",
    ):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="conv_blocks must be one number or more, got none"):
        VirTexConfig(conv_blocks=())
    assert VirTexConfig(vocab_size=VOCABULARY).heads == 16
