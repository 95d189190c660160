"""Attention that open_flamingo and transformers write out: every option, and when their own code runs."""

import copy

import pytest
import torch
from torch import nn

import vlmkernels
from benchmarks import peers
from vlmkernels.integrations import patch
from vlmkernels.testing import assert_as_good


def needs(library):
    return pytest.mark.skipif(
        peers.why_not(library) is not None, reason=f"{library}: {peers.why_not(library)}"
    )


@pytest.fixture
def calls(monkeypatch):
    """The attention ops that ran, in order."""
    names = []
    for name in ("interval_attention", "perceiver_attention"):
        ours = getattr(vlmkernels, name)

        def counting(*args, name=name, ours=ours, **kwargs):
            names.append(name)
            return ours(*args, **kwargs)

        monkeypatch.setattr(vlmkernels, name, counting)
    return names


def results(module, inputs, options):
    dtype = next(module.parameters()).dtype
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    module.zero_grad()
    out = module(*leaves, **options)
    out = out[0] if isinstance(out, tuple) else out
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves), *(p.grad for p in module.parameters())]


def assert_exact(module, inputs, **options):
    """As good as plain with attention patched alone."""
    plain = copy.deepcopy(module)
    assert patch(module, linear=False).patched
    got = results(module, inputs, options)
    low, exact = results(plain, inputs, options), results(copy.deepcopy(plain).double(), inputs, options)
    for ours, theirs, truth in zip(got, low, exact, strict=True):
        assert_as_good(ours, theirs, truth)


LOCATIONS = {  # of two images
    "before and after": [[0, 1, 0, 0, 1, 0, 0]] * 3,
    "more than there are": [[1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 1]],
}


@needs("open_flamingo.src.helpers")
class TestFlamingo:
    def cross(self, **options):
        torch.manual_seed(0)
        make = peers.load("open_flamingo.src.helpers").MaskedCrossAttention
        return make(dim=16, dim_visual=12, dim_head=8, heads=2, **options)

    def inputs(self):
        torch.manual_seed(1)
        return torch.randn(3, 7, 16), torch.randn(3, 2, 4, 12)

    @pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all previous"])
    @pytest.mark.parametrize("where", LOCATIONS)
    def test_rows_see_their_images(self, immediate, where, calls):
        locations = torch.tensor(LOCATIONS[where]).bool()
        for options in ({}, {"use_cached_media": True}):
            module = self.cross(only_attend_immediate_media=immediate)
            assert_exact(module, self.inputs(), media_locations=locations, **options)
        assert calls == ["interval_attention"] * 2

    def test_locations_of_a_cached_prompt_may_have_another_length(self, calls):
        x, media = self.inputs()
        assert_exact(
            self.cross(), (x[:, :2], media), media_locations=torch.ones(3, 9).bool(), use_cached_media=True
        )
        assert_exact(self.cross(), (x, media), media_locations=None, use_cached_media=True)
        assert calls == ["interval_attention"] * 2

    def test_errors_are_its_own(self):
        module = self.cross()
        patch(module)
        with pytest.raises(AssertionError, match="media_location"):
            module(*self.inputs(), media_locations=torch.ones(3, 5).bool())

    def test_the_perceiver_calls_its_projection_once_for_those_who_listen(self, calls):
        torch.manual_seed(0)
        module = peers.load("open_flamingo.src.helpers").PerceiverAttention(dim=16, dim_head=8, heads=2)
        inputs = torch.randn(3, 2, 6, 16), torch.randn(3, 2, 4, 16)
        assert_exact(module, inputs)
        assert calls == ["perceiver_attention"]
        heard = []
        module.to_kv.register_forward_hook(lambda m, args, out: heard.append(tuple(args[0].shape)))
        module(*inputs)
        assert heard == [(3, 2, 10, 16)]
        assert calls == ["perceiver_attention"]


@needs("transformers")
class TestTransformers:
    @pytest.mark.parametrize("norms", [False, True], ids=["plain", "qk norms"])
    def test_perceiver_of_idefics(self, norms, calls):
        torch.manual_seed(0)
        make = peers.load("transformers.models.idefics.perceiver").IdeficsPerceiverAttention
        assert_exact(make(16, 2, 8, norms), (torch.randn(3, 6, 16), torch.randn(3, 4, 16)))
        assert calls == ([] if norms else ["perceiver_attention"])

    def visual_bert(self, dropout=0.0):
        transformers = peers.load("transformers")
        torch.manual_seed(0)
        config = transformers.VisualBertConfig(
            hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=9, intermediate_size=8,
            visual_embedding_dim=4, max_position_embeddings=9, attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        model = transformers.VisualBertModel(config)
        return model.encoder.layer[0].attention.self

    def mask(self, seen):
        return (1 - torch.tensor(seen, dtype=torch.float32))[:, None, None] * torch.finfo(torch.float32).min

    def test_masks_of_visual_bert(self, calls):
        hidden = torch.randn(2, 5, 16)
        assert_exact(self.visual_bert(), (hidden,))
        assert_exact(
            self.visual_bert(), (hidden,), attention_mask=self.mask([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        )
        assert len(calls) == 2
        assert_exact(
            self.visual_bert(), (hidden,), attention_mask=self.mask([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1]])
        )
        assert_exact(
            self.visual_bert(), (hidden,), attention_mask=self.mask([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
        )
        assert len(calls) == 2

    def test_calls_of_visual_bert_that_run_its_own_code(self, calls):
        module, hidden = self.visual_bert(dropout=0.5).train(), torch.randn(2, 5, 16)
        plain = copy.deepcopy(module)
        patch(module, linear=False)
        torch.manual_seed(2)
        got = module(hidden)[0]
        torch.manual_seed(2)
        assert torch.equal(got, plain(hidden)[0])
        assert module.eval()(hidden, output_attentions=True)[1].shape == (2, 2, 5, 5)
        assert calls == []
        heard = []
        handle = module.dropout.register_forward_hook(lambda *_: heard.append(1))
        module(hidden)
        assert (heard, calls) == ([1], [])
        handle.remove()
        module(hidden)
        assert calls == ["interval_attention"]


def test_a_module_that_only_has_the_name_is_left_alone():
    class MaskedCrossAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(4, 4)

        def forward(self, x):
            return self.to_q(x)

    (entry,) = patch(MaskedCrossAttention(), linear=False)
    assert entry.why == "computes attention itself, with products and a softmax"
