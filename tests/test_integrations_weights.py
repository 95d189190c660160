"""Patched modules whose weights are computed, subclasses of Tensor, shards, tied or on the meta device."""

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from benchmarks import peers
from tests.test_integrations import needs, tiny_clip
from tests.test_integrations_linear import Gated, Line
from vlmkernels.integrations import patch, unpatch
from vlmkernels.nn.dense import MLP


class Counted(nn.Module):
    """A parametrization that doubles and counts."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, weight):
        self.count += 1
        return 2 * weight


class Packed(torch.Tensor):
    """A weight as torchao has them: each use makes a tensor of what is inside, here its double."""

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, inside.stride(), dtype=inside.dtype)

    def __init__(self, inside):
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inside)
        if func.namespace != "aten":  # a kernel would read memory that this weight has not: it fails the test
            raise NotImplementedError(f"{func} on a packed weight")
        args = tree_map_only(cls, lambda weight: 2 * weight.inside, args)
        return func(*args, **(kwargs or {}))


BUILDS = {
    "linear": (lambda: nn.Linear(6, 6), [""]),
    "mlp": (Line, ["up", "down"]),
    "gated": (Gated, ["gate", "up", "down"]),
    "sequential": (lambda: nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)), ["0", "2"]),
    "attention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), ["out_proj"]),
}


def call(module, x):
    if isinstance(module, nn.MultiheadAttention):
        return module(x, x, x, need_weights=False)[0]
    return module(x)


@pytest.fixture(params=BUILDS)
def pair(request):
    """Plain and patched, and the names of the layers inside."""
    torch.manual_seed(0)
    build, names = BUILDS[request.param]
    plain = build()
    ours = copy.deepcopy(plain)
    patch(ours)
    return plain, ours, names


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 5, 6)


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, n_power_iterations=1),
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": old_spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore")
def test_computed_weights(way, pair, x):
    plain, ours, names = pair
    for module in (plain, ours):
        for name in names:
            torch.manual_seed(2)
            WAYS[way](module.get_submodule(name))
    for training in (True, False):
        results = []
        for module in (plain, ours):
            torch.manual_seed(3)
            module.train(training).zero_grad()
            out = call(module, x)
            out.square().sum().backward(retain_graph=True)
            results.append([out, *(p.grad for p in module.parameters())])
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("training", [True, False])
def test_a_computed_weight_is_computed_as_often_as_without_a_patch(training, pair, x):
    counts = []
    for module in pair[:2]:
        module.train(training)
        for name in pair[2]:
            parametrize.register_parametrization(module.get_submodule(name), "weight", Counted())
        counters = [m for m in module.modules() if isinstance(m, Counted)]
        for counter in counters:
            counter.count = 0
        call(module, x)
        counts.append([counter.count for counter in counters])
    assert counts[1] == counts[0]
    assert isinstance(pair[0], nn.MultiheadAttention) or counts[0] == [1] * len(counts[0])


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
def test_computed_weights_of_attention(name, x):
    plain = nn.MultiheadAttention(6, 2, batch_first=True)
    nn.init.normal_(plain.in_proj_bias)
    ours = copy.deepcopy(plain)
    patch(ours)
    results = []
    for module in (plain, ours):
        owner, _, parameter = name.rpartition(".")
        counter = Counted()
        parametrize.register_parametrization(module.get_submodule(owner), parameter, counter)
        counter.count = 0
        results.append((call(module, x), counter.count))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert results[1][1] == results[0][1]


def test_weights_of_a_subclass_of_tensor(pair, x):
    plain, ours, names = pair
    before = call(ours, x)
    for module in (plain, ours):
        for name in names:
            layer = module.get_submodule(name)
            layer.weight = nn.Parameter(Packed(layer.weight.detach()), requires_grad=False)
    with torch.no_grad():
        wanted = call(plain, x)
        torch.testing.assert_close(call(ours, x), wanted)
        assert not torch.equal(wanted, before)


def test_hooks_of_all_kinds_set_after_patching(pair, x):
    def listen(module, heard):
        for name in pair[2] if not isinstance(module, nn.MultiheadAttention) else [""]:
            child = module.get_submodule(name)
            child.register_forward_pre_hook(lambda m, a: (a[0] * 2, *a[1:]))
            child.register_forward_hook(lambda m, a, out: heard.append("out"))
            child.register_forward_hook(lambda m, a, k, out: heard.append("out kwargs"), with_kwargs=True)
            child.register_full_backward_hook(lambda m, i, o: heard.append("back"))
            child.register_full_backward_pre_hook(lambda m, o: heard.append("pre back"))

    results = []
    for module in pair[:2]:
        heard, leaf = [], x.clone().requires_grad_()
        listen(module, heard)
        out = call(module, leaf)
        out.sum().backward()
        results.append((out, leaf.grad, heard))
    torch.testing.assert_close(results[1][:2], results[0][:2])
    assert results[1][2] == results[0][2]


def test_a_hook_can_silence_a_layer():
    block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    patch(block)
    block[1].register_forward_hook(lambda m, args, out: out * 0)
    torch.testing.assert_close(block(torch.randn(3, 6)), block[3].bias.expand(3, 6))


def test_a_forward_set_on_a_layer_after_patching(x):
    plain = Line()
    ours = copy.deepcopy(plain)
    patch(ours)
    for module in (plain, ours):
        module.up.forward = lambda y, own=module.up.forward: own(y) * 3
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("kind", [nn.Linear, Line, nn.Sequential])
def test_a_forward_replaced_for_a_whole_class(x, kind, monkeypatch):
    """As image generators do with torch.nn.Linear for their adapters: after patching, and before."""
    plain = nn.Sequential(nn.Linear(6, 6), Line())
    ours, late = copy.deepcopy(plain), copy.deepcopy(plain)
    patch(ours)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x) * 3)
    wanted = plain(x)
    torch.testing.assert_close(ours(x), wanted)
    patch(late)
    torch.testing.assert_close(late(x), wanted)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)
    monkeypatch.undo()
    torch.testing.assert_close(ours(x), plain(x))


@needs("accelerate")
@pytest.mark.filterwarnings("ignore")
def test_offloading_by_accelerate(pair, x):
    plain, ours, _ = pair
    if isinstance(ours, nn.MultiheadAttention):
        pytest.skip("torch reads out_proj without a call, accelerate loads it in the call")
    offload = peers.load("accelerate").cpu_offload
    with torch.no_grad():
        wanted = call(plain, x)
        offload(ours, execution_device=torch.device("cpu"))
        assert {p.device.type for p in ours.parameters()} == {"meta"}
        torch.testing.assert_close(call(ours, x), wanted)


@pytest.fixture
def one_process():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.look = nn.MultiheadAttention(6, 2, batch_first=True)
        self.mlp, self.head = Line(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.mlp(x + self.look(x, x, x, need_weights=False)[0]))


def test_sharding_after_patching(one_process, x):
    """fully_shard changes classes again, and weights are whole in the forward of their module alone."""
    mesh = init_device_mesh("cpu", (1,))
    for parts in ([], ["mlp"], ["mlp.up", "mlp.down", "head"], ["look"]):
        torch.manual_seed(0)
        plain = _Model()
        ours = copy.deepcopy(plain)
        patch(ours)
        for part in parts:
            fully_shard(ours.get_submodule(part), mesh=mesh)
        fully_shard(ours, mesh=mesh)
        wanted, got = plain(x), ours(x)
        torch.testing.assert_close(got, wanted)
        for out in (wanted, got):
            out.square().sum().backward()
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q.grad.full_tensor(), p.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_in_the_backward(reentrant, pair, x):
    results = []
    for module in pair[:2]:
        leaf = x.clone().requires_grad_()
        out = checkpoint(call, module, leaf, use_reentrant=reentrant)
        out.square().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in module.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_encoder_layers_of_torch(norm_first, grad, x):
    """In eval mode without gradients torch takes the weights out of the layers and calls none of them."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=norm_first, activation="gelu")
    plain = nn.TransformerEncoder(layer, 2).eval()
    ours = copy.deepcopy(plain)
    assert patch(ours).patched
    padding = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    for options in ({}, {"src_key_padding_mask": padding}):
        with torch.set_grad_enabled(grad):
            got, wanted = ours(x, **options), plain(x, **options)
        seen = ~options.get("src_key_padding_mask", torch.zeros(2, 5, dtype=torch.bool))[:, : got.shape[1]]
        torch.testing.assert_close(got[seen], wanted[seen])


def test_dynamic_quantization(pair, x):
    plain, ours, _ = pair
    want = type(ours)
    quantized = torch.ao.quantization.quantize_dynamic(ours.eval(), {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(call(quantized, x), call(plain.eval(), x), rtol=0.1, atol=0.05)
    assert type(ours) is want


def test_patched_on_the_meta_device(pair, x):
    plain, _, _ = pair
    with torch.device("meta"):
        ours = copy.deepcopy(plain).to("meta")
    assert patch(ours).patched
    assert call(ours, x.to("meta")).shape == call(plain, x).shape
    ours.to_empty(device="cpu").load_state_dict(plain.state_dict())
    torch.testing.assert_close(call(ours, x), call(plain, x))
    other = copy.deepcopy(plain).to("meta")
    patch(other)
    other.load_state_dict(plain.state_dict(), assign=True)
    torch.testing.assert_close(call(other, x), call(plain, x))


@needs("open_clip")
def test_texts_on_the_meta_device():
    from tests.test_integrations_padding import ONLY, clip, texts

    model = clip()
    with torch.device("meta"):
        other = copy.deepcopy(model).to("meta")
    (entry,) = patch(other, **ONLY)
    assert entry.status == "refused"
    assert "meta device" in entry.why
    other = copy.deepcopy(model)
    patch(other, **ONLY)
    other.to("meta")
    assert other.encode_text(texts().to("meta")).shape == (3, 24)


@needs("transformers")
def test_tied_weights_stay_tied():
    transformers = peers.load("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    patch(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert copy.deepcopy(model).lm_head.weight is not model.transformer.wte.weight
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.transformer.wte.weight
    model.tie_weights()
    unpatch(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_module_in_two_places_is_one_module(x):
    shared = nn.Linear(6, 6)
    model = nn.ModuleList([shared, nn.Sequential(shared, nn.GELU(), shared)])
    assert [entry.name for entry in patch(model)] == ["0", "1"]
    assert model[0] is model[1][0] is model[1][2] is shared
    unpatch(model)
    assert type(shared) is nn.Linear


def test_data_parallel_around_a_patched_model(one_process, pair, x):
    plain, ours, _ = pair
    ours = nn.parallel.DistributedDataParallel(ours)
    for module in (plain, ours):
        out = (
            module(x, x, x, need_weights=False)[0] if isinstance(plain, nn.MultiheadAttention) else module(x)
        )
        out.square().sum().backward()
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


@needs("transformers")
def test_patched_again_and_back():
    model, inputs = tiny_clip()
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    attributes = [set(vars(m)) for m in model.modules()]
    wanted = model(**inputs).logits_per_image
    first = patch(model)
    assert patch(model) == first
    assert [entry.status for entry in patch(model, linear=False)] == ["patched"] * 3
    assert list(model.state_dict()) == keys
    unpatch(model)
    unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(model(**inputs).logits_per_image, wanted)


@pytest.mark.parametrize("kind", [nn.GELU, nn.ReLU, nn.SiLU])
def test_an_activation_replaced_for_a_whole_class(kind, monkeypatch):
    plain = nn.Sequential(nn.Linear(6, 8), kind(), nn.Linear(8, 6))
    ours, late, own = copy.deepcopy(plain), copy.deepcopy(plain), MLP(*copy.deepcopy(plain))
    patch(ours)
    x, forward = torch.randn(5, 6), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, y: forward(self, y) * 3)
    patch(late)
    for module in (ours, late, own):
        torch.testing.assert_close(module(x), plain(x))
    monkeypatch.undo()
    for module in (ours, own):
        torch.testing.assert_close(module(x), plain(x))
