"""`patch(fused_loss=True)`: what its calls take and give, when a model's own code runs, which are refused."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import vlmkernels
from benchmarks import peers
from tests.peers.families import VOCABULARY, tokens
from tests.peers.language_models import LANGUAGE_MODELS, REFUSED, causal_inputs, masked_inputs
from vlmkernels.integrations import patch, unpatch

pytestmark = pytest.mark.skipif(
    peers.why_not("transformers") is not None, reason=f"transformers: {peers.why_not('transformers')}"
)
FUSED = {"loss": False, "attention": False, "linear": False, "padding": False, "fused_loss": True}
BUILDS = {family.name.split()[1].strip(","): family.build for family in reversed(LANGUAGE_MODELS)}


def build(name, **config):
    model = BUILDS[name]().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for option, value in config.items():
        setattr(model.config, option, value)
    return model


@pytest.fixture
def calls(monkeypatch):
    """The number of calls of linear_cross_entropy, as a list."""
    made = []
    ours = vlmkernels.linear_cross_entropy
    monkeypatch.setattr(vlmkernels, "linear_cross_entropy", lambda *a, **k: made.append(a) or ours(*a, **k))
    return made


def both(model):
    """The model and a patched copy."""
    ours = copy.deepcopy(model)
    (entry,) = patch(ours, **FUSED)
    assert entry.status == "patched", entry.why
    return model, ours


def why_not(model):
    (entry,) = patch(model, **FUSED)
    assert entry.status == "refused"
    return entry.why


def agree(plain, ours, inputs):
    """The loss and every gradient of one call."""
    results = []
    for model in (plain, ours):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()})
    torch.testing.assert_close(results[1], results[0])


def test_it_is_off_by_default(calls):
    model = build("Llama")
    assert "linear_cross_entropy" not in str(patch(model))
    assert model(**causal_inputs()).logits is not None
    report = patch(model, **FUSED)  # a second call adds it
    assert [(entry.name, entry.status) for entry in report] == [("", "patched")]
    assert model(**causal_inputs()).logits is None
    assert len(calls) == 1
    unpatch(model)
    assert model(**causal_inputs()).logits is not None


def test_calls_without_labels_and_evaluation_are_unchanged(calls):
    inputs = causal_inputs()
    without = {name: x for name, x in inputs.items() if name != "labels"}
    plain, ours = both(build("GPT-2"))
    assert torch.equal(ours(**without).logits, plain(**without).logits)
    theirs, got = plain.eval()(**inputs), ours.eval()(**inputs)
    assert torch.equal(got.logits, theirs.logits)
    assert torch.equal(got.loss, theirs.loss)
    assert not calls


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 5},
        {"shift_labels": F.pad(causal_inputs()["labels"], (0, 2), value=-100)[:, 2:].contiguous()},
        {"logits_to_keep": 5, "labels": causal_inputs()["labels"][:, -5:]},
        {"logits_to_keep": torch.tensor([1, 4, 6]), "shift_labels": causal_inputs()["labels"][:, [2, 5, 7]]},
        {"output_hidden_states": True, "use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_a_call_says_about_its_loss(options, calls):
    inputs = {**causal_inputs(), **options}
    if "ignore_index" in options:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 5)
    agree(*both(build("Llama")), inputs)
    assert len(calls) == 1


def test_labels_by_position(calls):
    inputs = causal_inputs()
    _, model = both(build("GPT-NeoX"))
    assert model(inputs["input_ids"], None, None, None, None, inputs["labels"]).logits is None
    assert len(calls) == 1


def test_outputs_as_tuples():
    inputs = causal_inputs()
    for name in ("Llama", "GPT-J"):  # whose decorator makes the tuple, and which makes it itself
        plain, ours = both(build(name))
        wanted, got = plain(**inputs, return_dict=False), ours(**inputs, return_dict=False)
        torch.testing.assert_close(got[0], wanted[0])
        assert got[1] is None
        assert len(got) == len(wanted)


def test_without_a_loss_the_logits_are_there():
    """BERT's pre-training wants the labels of both of its losses."""
    config = BUILDS["BERT"]().config
    plain, ours = both(peers.load("transformers").BertForPreTraining(config).eval())
    plain.train(), ours.train()
    for module in (*plain.modules(), *ours.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = masked_inputs()
    wanted, got = plain(**inputs), ours(**inputs)
    assert got.loss is wanted.loss is None
    torch.testing.assert_close(got.prediction_logits, wanted.prediction_logits)
    inputs["next_sentence_label"] = torch.arange(len(inputs["labels"])) % 2
    torch.testing.assert_close(ours(**inputs).loss, plain(**inputs).loss)
    assert ours(**inputs).prediction_logits is None


def test_no_label_at_all_gives_zero():
    _, ours = both(build("Llama"))
    inputs = causal_inputs()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = ours(**inputs).loss
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in ours.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["Llama", "BERT"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_loss_has_the_dtype_it_had(name, dtype):
    inputs = masked_inputs()
    for model in both(build(name).to(dtype)):
        loss = model(**inputs).loss
        loss.backward()
        assert loss.dtype == (torch.float32 if name == "Llama" else dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(**inputs).loss.dtype in (torch.float32, dtype)


def test_on_the_meta_device():
    """Where autocast does not exist."""
    inputs = {name: causal_inputs()[name].to("meta") for name in ("input_ids", "labels")}
    for model in both(build("Llama")):
        loss = model.to("meta")(**inputs).loss
        loss.backward()
        assert (loss.shape, loss.dtype) == ((), torch.float32)


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple | list) else [out]
        self.numel = max(self.numel, *(x.numel() for x in results if isinstance(x, torch.Tensor)), 0)
        return out


def test_no_matrix_of_logits():
    text = tokens(4, 32)
    for model, fused in zip(both(build("Llama")), (False, True), strict=True):
        with Largest() as largest:
            model(input_ids=text, labels=text).loss.backward()
        assert (largest.numel < text.numel() * VOCABULARY) is fused


def test_frozen_and_tied_weights():
    inputs = causal_inputs()
    model = build("GPT-2")
    assert model.lm_head.weight is model.transformer.wte.weight
    agree(*both(model), inputs)
    model.lm_head.weight.requires_grad_(False)
    agree(*both(model), inputs)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    agree(*both(model), inputs)


def test_hooks_on_the_head_get_the_logits(calls):
    inputs, seen = causal_inputs(), []
    plain, ours = both(build("Llama"))
    ours.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    agree(plain, ours, inputs)
    assert seen == [(*inputs["labels"].shape, VOCABULARY)]
    assert not calls
    unpatch(ours)
    assert why_not(ours) == "hooks on its head"


def test_hooks_between_the_model_and_its_head(calls):
    inputs, seen = masked_inputs(), []
    plain, ours = both(build("BERT"))
    hook = ours.cls.predictions.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    agree(plain, ours, inputs)
    assert seen == [(*inputs["labels"].shape, VOCABULARY)]
    assert not calls
    unpatch(ours)
    assert why_not(ours) == "hooks on predictions"
    hook.remove()
    ours.register_forward_hook(lambda module, args, out: seen.append(out.logits))
    both(ours)[1](**inputs)
    assert seen[1] is None
    assert len(calls) == 1


class Adapter(nn.Linear):
    """A head with an adapter, a subclass of torch.nn.Linear as those of peft and bitsandbytes."""

    def forward(self, x):
        return super().forward(x) * 2


class Wrapped(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x) * 2


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def _adapter(model):
    adapter = Adapter(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    adapter.weight = model.lm_head.weight
    model.lm_head = adapter


def _wrapper(model):
    model.lm_head = Wrapped(model.lm_head)


def _parametrized(model):
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())


def _replaced(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(x) * 2


@pytest.mark.parametrize("change", [_adapter, _wrapper, _parametrized, _replaced])
def test_a_head_that_is_more_than_its_weights_is_called(change, calls):
    inputs = causal_inputs()
    model = build("Llama")
    plain, ours = both(model)
    change(plain)
    change(ours)
    agree(plain, ours, inputs)
    assert not calls
    change(model)
    assert "head" in why_not(model)


def halved(logits, labels, vocab_size, **_):
    return F.cross_entropy(logits.transpose(1, 2), labels) / 2


def test_a_loss_function_of_the_user(calls):
    inputs = causal_inputs()
    model = build("Llama")
    plain, ours = both(model)
    for each in (model, plain, ours):
        each.loss_function = halved
    torch.testing.assert_close(ours(**inputs).loss, plain(**inputs).loss)
    assert ours(**inputs).logits is not None
    assert not calls
    assert why_not(copy.deepcopy(plain)) == "its loss_function is not one of transformers"


def test_a_criterion_that_is_replaced():
    """Options of linear_cross_entropy are honoured; weights of the classes are an error."""
    inputs = masked_inputs()
    plain, ours = both(build("DistilBERT"))
    for model in (plain, ours):
        model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.2)
    agree(plain, ours, inputs)
    ours.mlm_loss_fct = nn.CrossEntropyLoss(weight=torch.rand(VOCABULARY))
    with pytest.raises(TypeError, match="UncomputedLogits"):
        ours(**inputs)


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_models_that_are_refused(family):
    model = family.build().train()
    entry = family.patch(model)[0]
    assert (entry.name, entry.status) == ("", "refused")


def test_threads(calls):
    """One thread trains while others evaluate the same modules."""
    inputs = causal_inputs()
    without = {name: x for name, x in inputs.items() if name != "labels"}
    _, model = both(build("Llama"))
    wanted, faults = model(**without).logits, []

    def run(each, check):
        for _ in range(20):
            if not check(model(**each)):
                faults.append(each)

    threads = [
        threading.Thread(target=run, args=(inputs, lambda out: out.logits is None)),
        threading.Thread(target=run, args=(without, lambda out: torch.equal(out.logits, wanted))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_one_graph():
    """Without a break, where the plain model has none."""
    inputs = causal_inputs()
    torch.compiler.reset()
    plain, ours = both(build("Granite"))
    wanted = plain(**inputs).loss
    got = torch.compile(ours, backend="eager", fullgraph=True)(**inputs)
    torch.compiler.reset()
    torch.testing.assert_close(got.loss, wanted)
    assert got.logits is None
