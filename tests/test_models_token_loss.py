"""The losses of CausalLM, Flamingo and SimVLM from hidden states: those of their logits, without them."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from tests.flamingo_tiny import LAYOUTS, VOCABULARY, WIDTH, flamingo, inputs, language_model, sharpen
from tests.parity import close
from tests.simvlm_tiny import FORMS, tiny_batch, tiny_model
from vlmkernels.models import CausalLM, DecoderConfig
from vlmkernels.models import _flamingo_lm as lm
from vlmkernels.testing import assert_as_good, saved_activation_bytes

needs_transformers = pytest.mark.skipif(
    peers.why_not("transformers") is not None, reason=str(peers.why_not("transformers"))
)
KINDS = ["ours", *(pytest.param(kind, marks=needs_transformers) for kind in LAYOUTS)]


def loss_of(logits, labels):
    """By the book: all logits, those of the last position and of labels of -100 not counted."""
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), labels[:, 1:].flatten())


def step(model, loss):
    """The loss and the gradients of all that is trained, as one vector."""
    loss = loss(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    assert loss.dtype == torch.promote_types(dtype_of(model), torch.float32)
    return torch.cat([loss.view(1), *(g.flatten() for g in found if g is not None)]).detach()


def dtype_of(model):
    return next(model.parameters()).dtype


def assert_same_step(model, from_hidden, from_logits):
    """In float64 a step is that of the logits; in the model's own precision it is as near to it as theirs."""
    exact_model = copy.deepcopy(model).double()
    exact = step(exact_model, from_logits)
    close(step(exact_model, from_hidden), exact)
    assert_as_good(step(model, from_hidden), step(model, from_logits), exact)


def padded_text(rows=3, length=20):
    """Tokens, their mask, and labels that leave out padding and some tokens more."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([[length], [length - 7], [5]])).long()
    left_out = torch.rand(tokens.shape, generator=generator) < 0.3
    return tokens, mask, tokens.masked_fill((mask == 0) | left_out, -100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_language_model(dtype):
    """Its head is the embedding, which gets both gradients."""
    tokens, mask, labels = padded_text()
    assert_same_step(
        language_model("ours").to(dtype),
        lambda model: model(tokens, mask, labels=labels, return_logits=False).loss,
        lambda model: loss_of(model(tokens, mask).logits, labels),
    )


def test_what_the_language_model_returns():
    model = language_model("ours")
    tokens, mask, labels = padded_text()
    plain, both = model(tokens, mask), model(tokens, mask, labels=labels, logits_to_keep=2)
    alone = model(tokens, mask, labels=labels, return_logits=False)
    assert plain.loss is None
    assert torch.equal(both.logits, model(tokens, mask, logits_to_keep=2).logits)
    assert alone.logits is None
    assert torch.equal(both.loss, alone.loss)
    assert torch.equal(model.loss(tokens, labels, mask), alone.loss)
    torch.testing.assert_close(
        model.loss(tokens, None, mask), loss_of(plain.logits, tokens.masked_fill(mask == 0, -100))
    )
    assert model.loss(tokens, torch.full_like(tokens, -100)) == 0
    assert model.loss(tokens[:, :1]) == 0
    assert model.loss(tokens[:, :0]) == 0
    for bad in (labels[:, 1:], labels.int()):
        got = re.escape(f"got {bad.dtype} {list(bad.shape)}")
        with pytest.raises(
            ValueError, match=rf"CausalLM: labels must be int64 \[3, 20\] like input_ids, {got}"
        ):
            model.loss(tokens, bad)
    with pytest.raises(ValueError, match="CausalLM: logits_to_keep must not be negative, got -2"):
        model(tokens, logits_to_keep=-2)


def test_a_wrapped_language_model_is_called():
    """Hooks of the model see its call, and the loss compiles into one graph with the rest."""
    model, calls = language_model("ours"), []
    tokens, mask, labels = padded_text()
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    wanted = model.loss(tokens, labels, mask)
    assert calls == [1]
    handle.remove()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(tokens, mask, labels=labels, return_logits=False).loss
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_flamingo(kind, dtype):
    """Around each language model, frozen but for two rows of its embedding, with a head tied to it or not."""
    vision_x, lang_x = inputs()
    labels = lang_x.masked_fill(
        torch.rand(lang_x.shape, generator=torch.Generator().manual_seed(2)) < 0.5, -100
    )
    assert_same_step(
        flamingo(kind).to(dtype),
        lambda model: model(vision_x.to(dtype_of(model)), lang_x, None, labels, return_logits=False)["loss"],
        lambda model: loss_of(model(vision_x.to(dtype_of(model)), lang_x)["logits"], labels),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_flamingo_returns(kind):
    model = flamingo(kind)
    vision_x, lang_x = inputs()
    both = model(vision_x, lang_x, labels=lang_x)
    assert list(model(vision_x, lang_x, labels=lang_x, return_logits=False)) == ["loss"]
    assert list(model(vision_x, lang_x)) == ["logits"]
    assert torch.equal(both["logits"], model(vision_x, lang_x)["logits"])
    assert torch.equal(model(vision_x, lang_x, labels=lang_x, return_logits=False)["loss"], both["loss"])
    with pytest.raises(ValueError, match=r"Flamingo: labels must be int64 .* like lang_x, got torch.int32"):
        model(vision_x, lang_x, labels=lang_x.int())


@needs_transformers
@pytest.mark.parametrize("kind", LAYOUTS)
def test_heads_that_may_be_passed_over(kind):
    """Those of the known models, unless somebody waits for a call of head or model, or changed it."""
    model = flamingo(kind)
    language, (vision_x, lang_x) = model.lang_encoder, inputs()
    head, calls = language.get_output_embeddings(), []
    assert lm.plain_head(language) is head
    wanted = model(vision_x, lang_x, labels=lang_x)["loss"]
    for module in (head, language):
        handle = module.register_forward_hook(lambda module, inputs, output: calls.append(module))
        assert lm.plain_head(language) is None
        loss = model(vision_x, lang_x, labels=lang_x, return_logits=False)["loss"]
        torch.testing.assert_close(loss, wanted)
        handle.remove()
    assert calls == [head, language]
    language.set_output_embeddings(torch.nn.Sequential(head))
    assert lm.plain_head(language) is None
    language.__class__ = type(type(language).__name__, (type(language),), {})
    assert lm.plain_head(language) is None


@needs_transformers
def test_logits_that_are_more_than_the_heads():
    """Soft-capped ones: the loss is theirs."""
    transformers = peers.load("transformers")
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=48, final_logit_softcapping=0.5,
    )  # fmt: skip
    model = flamingo("llama", language=sharpen(transformers.Gemma2ForCausalLM(config)))
    vision_x, lang_x = inputs()
    out = model(vision_x, lang_x, labels=lang_x, return_logits=False)
    logits = model(vision_x, lang_x)["logits"]
    assert logits.abs().max() <= 0.5
    assert list(out) == ["loss"]
    torch.testing.assert_close(out["loss"], loss_of(logits, lang_x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_simvlm(form, dtype):
    images, tokens, lengths = tiny_batch()
    prefix = torch.tensor([4, 1, 2, 3])
    place = torch.arange(tokens.shape[1])
    labels = tokens.masked_fill((place < prefix[:, None]) | (place >= lengths[:, None]), -100)

    def arguments(model):
        return images.to(dtype_of(model)), tokens, prefix, lengths

    assert_same_step(
        tiny_model(form).to(dtype),
        lambda model: model(*arguments(model))["loss"],
        lambda model: loss_of(model(*arguments(model), return_logits=True)["logits"], labels),
    )


def test_logits_are_not_kept():
    """A step keeps the gradients of head and hidden states, where the logits are far more."""
    model = CausalLM(DecoderConfig(vocab_size=3000, width=16, layers=1, heads=2))
    tokens = torch.randint(0, 3000, (4, 128))
    table = model.get_input_embeddings().weight
    hidden, targets, logits = 4 * tokens.numel() * 16, 8 * tokens.numel(), 4 * tokens.numel() * 3000

    def kept(**options):
        return saved_activation_bytes(lambda x: model(x, **options), tokens, parameters=model.parameters())

    layers = kept(output_hidden_states=True, return_logits=False)
    assert layers + 4 * table.numel() + 2 * hidden + targets < logits / 4
    head = kept(labels=tokens, return_logits=False) - layers
    assert head <= 4 * table.numel() + 2 * hidden + targets
    table.requires_grad_(False)
    frozen = kept(labels=tokens, return_logits=False) - layers
    assert frozen <= 2 * hidden + targets
