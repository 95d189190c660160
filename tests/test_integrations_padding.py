"""patch on the text tower of open_clip's CLIP: texts are cut after the longest one where nobody notices."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks import peers
from vlmkernels.integrations import patch, unpatch

pytestmark = pytest.mark.skipif(
    peers.why_not("open_clip") is not None, reason=f"open_clip: {peers.why_not('open_clip')}"
)
CONTEXT, VOCABULARY, EOS = 12, 60, 40
ONLY = {"loss": False, "attention": False, "linear": False}
VISION = {"layers": 1, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 16}


def clip(**text):
    sizes = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 4, "layers": 2}
    torch.manual_seed(0)
    return peers.load("open_clip").model.CLIP(24, VISION, {**sizes, **text}, output_dict=True).eval()


def texts(end=VOCABULARY - 1, padding=0):
    tokens = torch.full((3, CONTEXT), padding)
    for row, length in zip(tokens, (4, 7, 2), strict=True):
        row[:length] = torch.arange(1, length + 1)
        row[length - 1] = end
    return tokens


def lengths_seen(model, tokens):
    """Of the texts in the attention layers of the text tower, and the embeddings."""
    forward = nn.MultiheadAttention.forward
    with mock.patch.object(nn.MultiheadAttention, "forward", autospec=True, side_effect=forward) as spy:
        out = model.encode_text(tokens)
    return [call.args[1].shape[1] for call in spy.call_args_list], out


@pytest.mark.parametrize("pool", ["argmax", "eos"])
def test_texts_are_cut_after_the_longest(pool):
    model = clip(pool_type=pool, eos_id=EOS)
    tokens = texts(EOS, padding=50) if pool == "eos" else texts()  # larger ids behind the end
    plain, ours = model.double(), copy.deepcopy(model).double()
    report = patch(ours, **ONLY)
    assert [(e.name, e.status) for e in report] == [("", "patched")]
    lengths, out = lengths_seen(ours, tokens)
    assert lengths == [7, 7]
    torch.testing.assert_close(out, plain.encode_text(tokens), rtol=1e-11, atol=1e-11)
    for module in (plain, ours):
        module(torch.ones(3, 3, 16, 16, dtype=torch.float64), tokens)["text_features"].sum().backward()
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12)


def test_a_hook_in_the_tower_sees_whole_texts():
    model = clip()
    patch(model, **ONLY)
    shapes = []
    handle = model.transformer.resblocks[1].ln_1.register_forward_hook(
        lambda m, i, out: shapes.append(out.shape)
    )
    model.encode_text(texts())
    assert shapes == [(3, CONTEXT, 32)]
    handle.remove()
    assert lengths_seen(model, texts())[0] == [7, 7]
    unpatch(model)
    assert lengths_seen(model, texts())[0] == [CONTEXT, CONTEXT]


def test_a_whole_text_and_an_empty_batch():
    model = clip()
    full = texts()
    full[1, -1] = VOCABULARY - 1
    full[1, 6] = 3
    want = model.encode_text(full)
    patch(model, **ONLY)
    assert torch.equal(model.encode_text(full), want)
    assert model.encode_text(full[:0]).shape == (0, 24)


@pytest.mark.parametrize(
    ("text", "why"),
    [({"pool_type": "last"}, "'last'"), ({"no_causal_mask": True}, "not causal")],
    ids=["pooled elsewhere", "not causal"],
)
def test_refused(text, why):
    (entry,) = patch(clip(**text), **ONLY)
    assert (entry.status, entry.name) == ("refused", "")
    assert why in entry.why


def test_a_subclass_and_the_option_leave_it_alone():
    model = clip()
    assert patch(model, **ONLY, padding=False) == []

    class Other(type(model)):
        def encode_text(self, text, normalize=False):
            return super().encode_text(text, normalize)

    model.__class__ = Other
    assert patch(model, **ONLY) == []
