"""patch, unpatch and drop_in on single modules: when our op runs, when their code does, what is refused."""

import copy
import inspect
import subprocess
import sys

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import vlmkernels
from benchmarks import peers
from tests.parity import needs
from vlmkernels.integrations import patch, unpatch
from vlmkernels.integrations._masks import intervals_of
from vlmkernels.reference.interval_attention import visible
from vlmkernels.testing import assert_as_good


@pytest.fixture
def calls(monkeypatch):
    """How often interval_attention ran."""
    count = []
    ours = vlmkernels.interval_attention

    def counting(*args, **kwargs):
        count.append(1)
        return ours(*args, **kwargs)

    monkeypatch.setattr(vlmkernels, "interval_attention", counting)
    return count


def causal(tokens, dtype=torch.bool):
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return (
        hidden
        if dtype == torch.bool
        else torch.zeros(tokens, tokens, dtype=dtype).masked_fill(hidden, -torch.inf)
    )


class TestMasks:
    def check(self, mask, seen, **options):  # seen is [B, Tq, Tk]
        start, end = intervals_of(mask, (len(seen), 4, *seen.shape[1:]), **options)
        assert start.dtype == end.dtype == torch.int32
        assert torch.equal(visible(start, end, seen.shape[-1]).expand_as(seen[:, None]), seen[:, None])

    @pytest.mark.parametrize("batch", [1, 3])
    def test_random_intervals_in_every_form(self, batch):
        torch.manual_seed(0)
        start = torch.randint(0, 6, (batch, 5))
        end = torch.maximum(torch.randint(0, 7, (batch, 5)), start)
        seen = visible(start, end, 6).squeeze(1)
        mask = seen[:, None]
        self.check(mask, seen)
        self.check(~mask, seen, true_is_seen=False)
        self.check(torch.zeros(mask.shape).masked_fill(~mask, -torch.inf), seen)
        self.check(mask.expand(batch, 4, 5, 6), seen)
        self.check(mask.repeat(1, 4, 1, 1), seen)

    @pytest.mark.parametrize("shape", [(5, 6), (1, 6), (5, 1), (1, 5, 6), (4, 5, 6), (1, 1, 6)])
    def test_few_dimensions_are_broadcast_from_the_right(self, shape):
        mask = ~causal(6)[1:].expand(4, 5, 6)[(0,) * (3 - len(shape))]
        mask = mask[tuple(slice(-n, None) for n in shape)].clone()
        self.check(mask, mask.broadcast_to(3, 4, 5, 6)[:, 0])

    def test_what_does_not_broadcast_is_left_to_torch(self):
        for shape in [(3, 5, 6), (2, 1, 5, 6), (5, 5), (4, 6), (1, 1, 1, 5, 6), (0, 6), (6,), ()]:
            assert intervals_of(torch.ones(shape, dtype=torch.bool), (3, 4, 5, 6)) is None, shape

    def test_padding_and_finite_masks(self):
        seen = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
        mask = torch.zeros(2, 1, 1, 4).masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
        self.check(mask, seen[:, None].expand(2, 3, 4))

    def test_what_is_no_interval(self):
        shape = 1, 2, 1, 3
        assert intervals_of(torch.tensor([[True, False, True]]), shape) is None
        assert intervals_of(torch.tensor([[0.0, -1.0, 0.0]]), shape) is None
        assert intervals_of(torch.tensor([[0.0, float("nan"), 0.0]]), shape) is None
        assert intervals_of(torch.tensor([[1, 0, 0]]), shape) is None
        assert intervals_of(torch.zeros(1, 3, requires_grad=True), shape) is None
        uniform = torch.full((1, 3), torch.finfo(torch.float32).min)
        assert intervals_of(uniform, shape) is None
        heads = torch.ones(1, 2, 3, 3, dtype=torch.bool)
        heads[:, 1] = causal(3)
        assert intervals_of(heads, (1, 2, 3, 3)) is None

    @pytest.mark.parametrize("inference", [False, True])
    def test_a_mask_is_read_again_when_it_changes(self, inference):
        def changes(mask):
            yield
            mask[0, 2:] = False
            yield
            mask.data[0, 1:] = False
            yield
            mask.numpy()[0, :3] = True

        shape, array = (1, 1, 1, 4), numpy.ones((1, 4), dtype=bool)
        with torch.inference_mode(inference):
            for mask in (torch.ones(1, 4, dtype=torch.bool), torch.from_numpy(array)):
                for _ in changes(mask):
                    seen = mask.clone()
                    self.check(mask, seen[None])
                    self.check(mask, ~seen[None], true_is_seen=False)
        array[:] = [[False, True, True, True]]
        self.check(mask, mask.clone()[None])
        array[:] = [[True, False, True, True]]
        assert intervals_of(mask, shape) is None

    def test_a_mask_read_without_gradients_serves_a_training_step(self):
        module, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 5, 8)
        patch(module)
        options = {"attn_mask": causal(5), "need_weights": False}
        with torch.inference_mode():
            module(x, x, x, **options)
        module(x, x, x, **options)[0].sum().backward()


def both(module, *args, linear=True, **kwargs):
    """Results and gradients: of the patched module, of the plain one, of the plain one in float64."""
    results = []
    plain = copy.deepcopy(module)
    patch(module, linear=linear)
    for each in (module, plain, copy.deepcopy(plain).double()):
        dtype = next(each.parameters()).dtype
        leaves = {id(x): x.detach().to(dtype, copy=True).requires_grad_() for x in args}
        inputs = [leaves[id(x)] for x in args]
        options = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in kwargs.items()
        }
        out = each(*inputs, **options)
        out = out[0] if isinstance(out, tuple) else out
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        weights = torch.cat([p.grad.flatten() for p in each.parameters()])
        results.append([out, *(x.grad for x in leaves.values()), weights])
    return results


def assert_both(module, *args, **kwargs):
    for ours, theirs, exact in zip(*both(module, *args, **kwargs), strict=True):
        assert_as_good(ours, theirs, exact)


class TestMultiheadAttention:
    def inputs(self, batch_first=True, key_width=16):
        torch.manual_seed(1)
        query, key, value = (torch.randn(3, t, d) for t, d in ((5, 16), (7, key_width), (7, key_width)))
        return (query, key, value) if batch_first else tuple(x.transpose(0, 1) for x in (query, key, value))

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("widths", [{}, {"kdim": 12, "vdim": 12}], ids=["one width", "kdim"])
    def test_cross_attention(self, batch_first, bias, widths, calls):
        module = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first, **widths)
        assert_both(module, *self.inputs(batch_first, widths.get("kdim", 16)), need_weights=False)
        assert len(calls) == 1

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
    def test_masks(self, dtype, calls):
        module = nn.MultiheadAttention(16, 4, batch_first=True)
        x = torch.randn(3, 6, 16)
        padding = torch.arange(6) >= torch.tensor([6, 4, 2])[:, None]
        masks = [
            {"attn_mask": causal(6, dtype)},
            {"attn_mask": causal(6, dtype), "is_causal": True},
            {"key_padding_mask": padding},
            {"attn_mask": causal(6, dtype), "key_padding_mask": padding},
            {"attn_mask": causal(6, dtype).repeat(12, 1, 1)},
        ]
        for count, mask in enumerate(masks, 1):
            unpatch(module)
            module.zero_grad()
            assert_both(module, x, x, x, need_weights=False, **mask)
            assert len(calls) == count, mask.keys()

    def test_calls_that_run_its_own_code(self, calls):
        module = nn.MultiheadAttention(16, 4, batch_first=True)
        query, key, value = self.inputs()
        hole = torch.zeros(5, 7, dtype=torch.bool)
        hole[:, 3] = True
        assert_both(module, query, key, value)  # asks for the weights
        unpatch(module)
        module.zero_grad()
        assert_both(module, query, key, value, need_weights=False, attn_mask=hole)
        _, weights = module(query, key, value)
        assert weights.shape == (3, 5, 7)
        assert module(query[0], key[0], value[0], need_weights=False)[0].shape == (5, 16)
        module.dropout = 0.5
        torch.manual_seed(0)
        dropped = module(query, key, value, need_weights=False)[0]
        assert calls == []
        unpatch(module)
        torch.manual_seed(0)
        assert torch.equal(dropped, module(query, key, value, need_weights=False)[0])

    def test_errors_are_its_own(self):
        module = nn.MultiheadAttention(16, 4, batch_first=True)
        patch(module)
        with pytest.raises(Exception, match="causal"):
            module(*self.inputs(), need_weights=False, is_causal=True)

    def test_refused(self):
        class Own(nn.MultiheadAttention):
            pass

        assert (
            patch(Own(16, 4)).refused[0].why
            == "a subclass of torch.nn.MultiheadAttention with its own forward"
        )
        (entry,) = patch(nn.MultiheadAttention(16, 4, add_bias_kv=True), linear=False)
        assert entry.status == "refused"
        assert "append keys" in entry.why


@pytest.mark.parametrize("mask", [{}, {"attn_mask": causal(5)}, {"key_padding_mask": torch.ones(2, 5) == 0}])
def test_another_default_device(mask):
    module, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    wanted = module(x, x, x, need_weights=False, **mask)[0]
    patch(module)
    with torch.device("meta"):
        torch.testing.assert_close(module(x, x, x, need_weights=False, **mask)[0], wanted)


class SelfAttention(nn.Module):
    """As timm and many others write it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, mask=None, is_causal=False):
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.proj(out.transpose(1, 2).flatten(2))


def test_modules_that_call_scaled_dot_product_attention(calls):
    x = torch.randn(3, 6, 16)
    for count, options in enumerate([{}, {"is_causal": True}, {"mask": ~causal(6)}], 1):
        assert_both(SelfAttention(), x, **options)
        assert len(calls) == count
    hole = torch.ones(6, 6, dtype=torch.bool)
    hole[:, 2] = False
    assert_both(SelfAttention(), x, mask=hole)
    assert len(calls) == 3


@pytest.mark.parametrize("batch", [1, 3, 4])  # of four heads
@pytest.mark.parametrize("shape", [(6, 6), (1, 6), (6, 1), (1, 6, 6), (4, 6, 6), (4, 1, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_scaled_dot_product_attention_are_aligned_from_the_right(batch, shape, dtype, calls):
    x = torch.randn(batch, 6, 16)
    one, several = torch.ones(6, 6).tril().bool(), torch.ones(4, 6, 6).tril().bool()
    several[1] = torch.ones(6, 6).tril(2).bool()  # heads differ
    seen = several if len(shape) == 3 and shape[0] == 4 else one.expand(4, 6, 6)
    seen = seen[(0,) * (3 - len(shape))][tuple(slice(-n, None) for n in shape)].clone()
    mask = seen if dtype == torch.bool else torch.zeros(shape).masked_fill(~seen, -torch.inf)
    assert_both(SelfAttention(), x, mask=mask, linear=False)
    differ = shape[0] == 4 and not torch.equal(seen[:1].expand_as(seen), seen)
    assert len(calls) == (0 if differ else 1)


def test_masks_of_each_text_and_head(calls):
    x, seen = torch.randn(3, 6, 16), (torch.arange(6) < torch.tensor([6, 4, 2])[:, None])[:, None, None]
    for count, mask in enumerate([seen, seen.expand(3, 4, 6, 6), seen.repeat(1, 4, 6, 1)], 1):
        assert_both(SelfAttention(), x, mask=mask)
        assert len(calls) == count
    mask = seen.repeat(1, 4, 6, 1)
    mask[1, 2] = True
    assert_both(SelfAttention(), x, mask=mask)
    assert len(calls) == 3
    plain, ours = SelfAttention(), SelfAttention()
    patch(ours)
    for module in (plain, ours):  # a batch of its own, or too many heads
        for shape in ((2, 1, 6, 6), (3, 6, 6), (5, 6)):
            with pytest.raises(RuntimeError, match=r"expand|must match"):
                module(x, mask=torch.ones(shape, dtype=torch.bool))


def test_attention_by_name_alone_is_reported():
    class HomemadeAttention(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    (entry,) = patch(HomemadeAttention(4, 4), linear=False)
    assert (entry.status, entry.cls.endswith("HomemadeAttention")) == ("refused", True)


def test_a_forward_set_on_the_object_is_refused():
    module = nn.MultiheadAttention(16, 4)
    module.forward = module.forward
    assert "on the object" in patch(module).refused[0].why


def test_a_class_changed_after_patching_is_not_restored():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    module = nn.Sequential(nn.MultiheadAttention(16, 4))
    patch(module)
    parametrize.register_parametrization(module[0], "in_proj_weight", Double())
    with pytest.raises(ValueError, match=r"unpatch: 0: its class was changed again .* parametrization"):
        unpatch(module)
    parametrize.remove_parametrizations(module[0], "in_proj_weight")
    unpatch(module)
    assert type(module[0]) is nn.MultiheadAttention


def test_the_report_reads_as_a_table():
    module = nn.Sequential(nn.MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4, add_zero_attn=True))
    report = patch(module, linear=False)
    assert [entry.name for entry in report.patched] == ["0"]
    assert [entry.name for entry in report.refused] == ["1"]
    assert str(report).splitlines()[0].split() == ["module", "class", "what", "runs,", "or", "why", "not"]
    assert "append keys" in str(report)
    assert patch(nn.MultiheadAttention(16, 4), attention=False, linear=False) == []


def test_a_second_call_adds_an_option():
    module = nn.Sequential(nn.MultiheadAttention(16, 4))
    assert patch(module, attention=False, linear=False) == []
    first = patch(module, linear=False)
    assert [entry.status for entry in first] == ["patched"]
    assert patch(module, loss=False, linear=False) == first
    assert patch(module, attention=False, linear=False) == []
    assert type(module[0]) is not nn.MultiheadAttention


def test_nothing_else_is_imported():
    code = """
import sys, torch, vlmkernels.integrations as integrations
integrations.patch(torch.nn.MultiheadAttention(8, 2))
found = {name.partition(".")[0] for name in sys.modules}
print(found & {"transformers", "open_clip", "open_flamingo", "timm", "sentence_transformers", "einops"})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_pickle_is_read_in_another_process(tmp_path):
    module = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    patch(module)
    torch.save(module, tmp_path / "module.pt")
    code = f"""
import torch
module = torch.load({str(tmp_path / "module.pt")!r}, weights_only=False)
from vlmkernels.integrations import patch, unpatch
print(patch(module, linear=False)[0].status, type(module[0]) is torch.nn.MultiheadAttention)
unpatch(module)
print(type(module[0]) is torch.nn.MultiheadAttention)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["patched", "False", "True"]


def tiny_clip(**options):
    transformers = peers.load("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **sizes, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 29, "bos_token_id": 1,
        },
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )  # fmt: skip
    model = transformers.CLIPModel._from_config(config, **options).eval()
    inputs = {"input_ids": torch.arange(10).view(2, 5) + 20, "pixel_values": torch.randn(2, 3, 16, 16)}
    return model, inputs


@needs("transformers")
class TestTransformers:
    def test_trainers_see_the_arguments_of_the_model(self):
        model, _ = tiny_clip()
        before = inspect.signature(model.forward), model.config_class, str(type(model))
        patch(model)
        assert (inspect.signature(model.forward), model.config_class, str(type(model))) == before

    def test_another_attention_can_be_chosen_after_patching(self, calls):
        model, inputs = tiny_clip()
        patch(model)
        model(**inputs)
        assert len(calls) == 2
        model.set_attn_implementation("eager")
        out = model(**inputs, output_attentions=True)
        assert out.text_model_output.attentions[0].shape == (2, 2, 5, 5)
        assert len(calls) == 2
        model.set_attn_implementation("sdpa")
        model(**inputs)
        assert len(calls) == 4

    def test_eager_is_refused_with_a_reason(self):
        model, _ = tiny_clip(attn_implementation="eager")
        refused = patch(model, linear=False).refused
        assert {entry.why for entry in refused} == {
            "attn_implementation='eager' returns the attention weights; 'sdpa' can be patched"
        }

    def test_tuples_are_returned_where_they_are_asked_for(self):
        model, inputs = tiny_clip()
        wanted = model(**inputs, return_loss=True, return_dict=False)
        patch(model)
        got = model(**inputs, return_loss=True, return_dict=False)
        assert isinstance(got, tuple)
        assert len(got) == len(wanted)
        torch.testing.assert_close(got[0], wanted[0])

    def test_align_gives_attention_weights_to_those_who_ask(self):
        transformers = peers.load("transformers")
        config = transformers.AlignTextConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
        model = transformers.AlignTextModel(config).eval()
        ids = torch.arange(10).view(2, 5)
        wanted = model(ids, output_attentions=True).attentions
        model = copy.deepcopy(model)
        patch(model)
        got = model(ids, output_attentions=True).attentions
        assert len(got) == 2
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
