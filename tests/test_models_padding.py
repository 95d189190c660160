"""Padding and tokens that nobody reads: on a CPU they are left out, and nothing changes by it."""

import pytest
import torch

from vlmkernels import _native
from vlmkernels.models.align import ALIGN, AlignConfig
from vlmkernels.models.clip import CLIP, ClipConfig
from vlmkernels.models.parts import padding

drops = pytest.mark.skipif(_native.extension is None, reason="padding is dropped with the C++ kernels alone")
EOT, LENGTH = 96, 12
CLIP_TINY = ClipConfig(
    embed_dim=24, image_size=32, patch_size=8, vision_width=64, vision_layers=2, vision_heads=4,
    context_length=LENGTH, vocab_size=97, eot_id=EOT, text_width=48, text_layers=3, text_heads=4,
)  # fmt: skip
ALIGN_TINY = AlignConfig(
    embed_dim=80, image_size=64, image_width=0.25, image_depth=0.4, drop_rate=0.0, vocab_size=97,
    max_positions=24, context_length=16, text_width=128, text_layers=3, text_mlp_width=192, text_dropout=0.0,
)  # fmt: skip


def clip_texts(lengths: list[int], padding: int = 0) -> torch.Tensor:
    tokens = torch.full((len(lengths), LENGTH), padding)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, EOT, (length,))
        row[length - 1] = EOT
    return tokens


def align_texts(lengths: list[int]) -> torch.Tensor:
    tokens = torch.randint(1, 97, (len(lengths), LENGTH))
    return tokens * (torch.arange(LENGTH) < torch.tensor(lengths)[:, None])


def results(model, tokens) -> list[torch.Tensor]:
    """Embeddings and the gradients of all parameters of the text tower."""
    model.zero_grad()
    out = model.encode_text(tokens)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@drops
@pytest.mark.parametrize("lengths", [[3, 12, 1, 7], [12] * 3, [1], [2, 2]], ids=str)
@pytest.mark.parametrize("build", [lambda: CLIP(CLIP_TINY), lambda: ALIGN(ALIGN_TINY)], ids=["clip", "align"])
def test_packed_texts_equal_padded_ones(build, lengths, monkeypatch):
    torch.manual_seed(0)
    model = build().double()
    tokens = (clip_texts if isinstance(model, CLIP) else align_texts)(lengths)
    packed = results(model, tokens)
    monkeypatch.setattr(padding, "can_drop", lambda tokens: False)
    padded = results(model, tokens)
    assert len(packed) == len(padded) > 30
    for a, b in zip(packed, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@drops
def test_layers_see_no_padding_and_the_last_one_answers_for_one_token_a_row():
    model, shapes = CLIP(CLIP_TINY), []

    def note(block, inputs, out):
        shapes.append((tuple(inputs[0].shape), tuple(out.shape)))

    for block in (*model.transformer.resblocks, *model.visual.transformer.resblocks):
        block.register_forward_hook(note)
    model.encode_text(clip_texts([3, 12, 1, 7]))
    assert shapes == [((1, 23, 48), (1, 23, 48))] * 2 + [((1, 23, 48), (1, 4, 48))]
    shapes.clear()
    model.encode_image(torch.randn(2, 3, 32, 32))
    assert shapes == [((2, 17, 64), (2, 17, 64)), ((2, 17, 64), (2, 1, 64))]


def test_what_stands_after_the_end_of_text_changes_no_bit():
    torch.manual_seed(0)
    model = CLIP(CLIP_TINY)
    torch.manual_seed(1)
    a = model.encode_text(clip_texts([5, 9, 2]))
    torch.manual_seed(1)
    b = model.encode_text(clip_texts([5, 9, 2], padding=33))
    assert torch.equal(a, b)


def test_the_class_token_alone_equals_that_of_all_tokens():
    torch.manual_seed(0)
    tower = CLIP(CLIP_TINY).double().visual
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    whole = tower.ln_post(tower._tokens(images)[:, 0]) @ tower.proj
    torch.testing.assert_close(tower(images), whole, rtol=1e-11, atol=1e-11)
