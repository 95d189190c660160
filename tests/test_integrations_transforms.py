"""Patched models under what looks at their code or their derivatives: their own code runs there."""

import contextlib
import copy
import inspect

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from tests.test_integrations import needs, tiny_clip
from tests.test_integrations_linear import Gated, Line
from tests.test_integrations_padding import clip, texts
from vlmkernels.integrations import drop_in, patch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
LONG, SHORT = 7, 4  # texts of `texts()`


class Attention(nn.Module):
    """All that patch does to torch's own parts: attention by both ways, an MLP and a gated one."""

    def __init__(self):
        super().__init__()
        self.look = nn.MultiheadAttention(6, 2, batch_first=True)
        self.qkv, self.mlp, self.gated = nn.Linear(6, 18), Line(), Gated()
        self.line = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, 6] -> [B, 4]
        q, k, v = torch.split(self.qkv(x).unflatten(-1, [2, 9]).transpose(1, 2), [3, 3, 3], -1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.look(x, x, x, need_weights=False)[0] + out.transpose(1, 2).flatten(2)
        return self.mlp(self.gated(self.line(x))).mean(1)


@pytest.fixture
def models():
    """Plain and patched."""
    torch.manual_seed(0)
    plain = Attention().eval()
    ours = copy.deepcopy(plain)
    assert len(patch(ours).patched) == 13
    return plain, ours


@contextlib.contextmanager
def differentiable_attention():
    """torch's flash kernel has neither a forward derivative nor one under vmap."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def ops_of(traced):
    return {str(node.target) for node in traced.graph.nodes if "vlmkernels" in str(node.target)}


@pytest.mark.parametrize("frozen", [False, True])  # torch's attention has another path for frozen weights
def test_trace_holds_for_other_sizes(frozen, models):
    plain, ours = models
    for p in [*plain.parameters(), *ours.parameters()]:
        p.requires_grad_(not frozen)
    traced = torch.jit.trace(ours, torch.randn(2, 5, 6), check_trace=frozen)
    assert "vlmkernels" not in str(traced.inlined_graph)
    for shape in ((3, 5, 6), (2, 8, 6), (1, 2, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), plain(x))


@needs("open_clip")
def test_traced_texts_may_be_longer_or_shorter():
    model = clip().eval()
    wanted = {n: model.encode_text(texts()[i : i + 1]) for i, n in enumerate((SHORT, LONG))}
    patch(model)
    for given in (0, 1):
        traced = torch.jit.trace_module(model, {"encode_text": texts()[given : given + 1]})
        for i, n in enumerate((SHORT, LONG)):
            torch.testing.assert_close(traced.encode_text(texts()[i : i + 1]), wanted[n])


@needs("transformers")
def test_traced_transformers_hold_for_other_sizes():
    plain = tiny_clip()[0].text_model.eval()
    ours = copy.deepcopy(plain)
    patch(ours)
    for mask in (False, True):
        ids = torch.arange(10).view(2, 5) + 20
        args = (ids, torch.ones_like(ids)) if mask else (ids,)
        traced = torch.jit.trace(ours, args, strict=False)
        args = tuple(x[:1] for x in args)
        torch.testing.assert_close(traced(*args)["last_hidden_state"], plain(*args).last_hidden_state)


def test_script(models):
    plain, ours = models
    scripted, x = torch.jit.script(ours), torch.randn(2, 5, 6)
    torch.testing.assert_close(scripted(x), plain(x))
    assert [type(m) for m in ours.modules()] != [type(m) for m in plain.modules()]  # it is still patched
    torch.testing.assert_close(ours(x), plain(x))
    for patched, own in zip(ours.modules(), plain.modules(), strict=True):
        assert inspect.signature(patched.forward) == inspect.signature(own.forward)
        assert inspect.getsource(patched.forward) == inspect.getsource(own.forward)


@needs("open_clip")
def test_script_of_open_clip():
    model = clip()
    wanted = model.encode_text(texts())
    patch(model)
    torch.testing.assert_close(torch.jit.script(model).encode_text(texts()), wanted)


def test_symbolic_trace(models):
    plain, ours = models
    traced, x = torch.fx.symbolic_trace(ours), torch.randn(2, 5, 6)
    torch.testing.assert_close(traced(x), plain(x))
    nodes = [(n.op, str(n.target)) for n in traced.graph.nodes]
    assert nodes == [(n.op, str(n.target)) for n in torch.fx.symbolic_trace(plain).graph.nodes]
    for build in (nn.Linear(6, 4), Line(), Gated(), nn.Sequential(nn.Linear(6, 4), nn.GELU())):
        patch(build)
        x = torch.randn(5, 6)
        traced = torch.fx.symbolic_trace(build)
        assert [n.target for n in traced.graph.nodes if n.op == "placeholder"] == list(
            inspect.signature(build.forward).parameters
        )
        torch.testing.assert_close(traced(x), build(x))


@needs("timm")
@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_convnext2", "test_coatnet"])
def test_timm(name):
    """What timm's own tests do with its models."""
    torch.manual_seed(0)
    plain = peers.load("timm").create_model(name, num_classes=5).eval()
    ours, x = copy.deepcopy(plain), torch.randn(3, *plain.default_cfg["input_size"])
    assert patch(ours).patched
    with torch.no_grad():
        wanted = plain(x)
        torch.testing.assert_close(ours(x), wanted)
        torch.testing.assert_close(torch.jit.script(ours)(x), wanted)
        torch.testing.assert_close(torch.jit.trace(ours, x[:1], check_trace=False)(x), wanted)
        if name != "test_vit":  # which asks for the size of an image
            torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), wanted)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode, models):
    plain, ours = models
    x = torch.randn(2, 5, 6)
    traced = make_fx(ours, None, mode, _allow_non_fake_inputs=True)(torch.randn(2, 5, 6))
    assert not ops_of(traced)
    torch.testing.assert_close(traced(x), plain(x))


@needs("open_clip")
def test_make_fx_of_texts():
    model = clip().eval()
    wanted = model.encode_text(texts())
    patch(model)
    traced = make_fx(lambda tokens: model.encode_text(tokens))(texts()[:1])
    torch.testing.assert_close(traced(texts()[1:2]), wanted[1:2])


def test_fake_tensors(models):
    """Memory is planned with them: every shape is known, no number is."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 5, 6)
        for model in models:
            assert model(x).shape == (2, 4)


@needs("open_clip")
def test_fake_texts():
    model = clip()
    patch(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model.encode_text(mode.from_tensor(texts())).shape == (3, 24)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_sizes(strict, models):
    plain, ours = models
    sizes = {0: torch.export.Dim("b", min=2, max=64), 1: torch.export.Dim("t", min=2, max=64)}
    exported = torch.export.export(ours, (torch.randn(2, 5, 6),), dynamic_shapes=(sizes,), strict=strict)
    for shape in ((2, 5, 6), (3, 9, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported.module()(x), plain(x))
    assert not ops_of(exported)


def test_per_sample_gradients(models):
    plain, ours = models
    x = torch.randn(4, 5, 6)

    def gradients(model):
        parameters = dict(model.named_parameters())

        def loss(parameters, row):
            return functional_call(model, parameters, (row[None],)).square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(parameters, x)

    with differentiable_attention():
        for got, wanted in zip(gradients(ours).values(), gradients(plain).values(), strict=True):
            assert torch.equal(got, wanted)


def forward_dual(model, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent


def nested(model, x, tangent):
    return jvp(grad(lambda y: model(y).square().sum()), (x,), (tangent,))[1]


DIRECTIONS = {
    "jvp": lambda model, x, tangent: jvp(model, (x,), (tangent,))[1],
    "dual": forward_dual,
    "jvp of grad": nested,
    "jacfwd": lambda model, x, tangent: torch.func.jacfwd(model)(x),
    "hessian": lambda model, x, tangent: torch.func.hessian(lambda y: model(y).sum())(x),
    "linearize": lambda model, x, tangent: torch.func.linearize(model, x)[1](tangent),
}


@pytest.mark.parametrize("which", DIRECTIONS)
@pytest.mark.filterwarnings("ignore")
def test_directional_derivatives(which, models):
    plain, ours = models
    x, tangent = torch.randn(2, 2, 3, 6)
    with differentiable_attention():
        wanted = DIRECTIONS[which](plain, x, tangent)
        assert wanted.abs().max() > 0
        assert torch.equal(DIRECTIONS[which](ours, x, tangent), wanted)


def test_dual_weights(models):
    """Inputs need not be dual: a tangent may come with the weights."""
    plain, ours = models
    x = torch.randn(2, 3, 6)
    tangents = {name: torch.randn_like(p) for name, p in plain.named_parameters()}

    def directed(model):
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(p, tangents[n]) for n, p in model.named_parameters()}
            return forward_ad.unpack_dual(functional_call(model, duals, (x,))).tangent

    with differentiable_attention():
        assert torch.equal(directed(ours), directed(plain))


@needs("open_clip")
@pytest.mark.parametrize("name", ["ClipLoss", "CoCaLoss", "SigLipLoss"])
def test_losses_have_directional_derivatives(name):
    cls = getattr(peers.load("open_clip.loss"), name)
    arguments = (2.0, 1.0) if name == "CoCaLoss" else ()
    image, text, tangent = torch.randn(3, 5, 8)
    logits, labels = torch.randn(5, 3, 7), torch.randint(7, (5, 3))

    def directed(loss):
        more = (logits, labels) if name == "CoCaLoss" else ()
        scale = torch.tensor(5.0)
        bias = {"logit_bias": torch.tensor(-2.0)} if name == "SigLipLoss" else {}

        def total(x):
            return sum(loss(x, text, *more, scale, **bias, output_dict=True).values())

        return jvp(total, (image,), (tangent,))[1]

    wanted = directed(cls(*arguments))
    assert wanted != 0
    assert torch.equal(directed(drop_in(cls)(*arguments)), wanted)


@pytest.mark.parametrize("which", ["vmap", "jvp", "grad"])
def test_transforms_inside_compiled_code(which):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    ours, x = copy.deepcopy(plain), torch.randn(4, 6)
    patch(ours)
    run = {
        "vmap": lambda model: vmap(lambda row: model(row))(x),
        "jvp": lambda model: jvp(model, (x,), (x,))[1],
        "grad": lambda model: grad(lambda y: model(y).sum())(x),
    }[which]
    torch.compiler.reset()
    got = torch.compile(lambda: run(ours), backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(got, run(plain))


def test_compiled_code_keeps_our_ops(models):
    plain, ours = models
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(torch.compile(ours, backend=backend, fullgraph=True)(x), plain(x))
    (graph,) = graphs
    assert all(f"vlmkernels.{op}" in graph for op in ("linear", "mlp", "gated_mlp", "interval_attention"))
