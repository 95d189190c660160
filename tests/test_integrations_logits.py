"""Which forwards of language models `patch(fused_loss=True)` takes, read from their source."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import CrossEntropyLoss

from benchmarks import peers
from vlmkernels.integrations import patch

if peers.why_not("transformers") is not None:
    pytest.skip(f"transformers: {peers.why_not('transformers')}", allow_module_level=True)
transformers = peers.load("transformers")
Llama = transformers.LlamaForCausalLM
Output = peers.load("transformers.modeling_outputs").CausalLMOutput


class _Model(Llama):
    """A language model whose subclasses have their own forward."""

    def __init__(self):
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        super().__init__(transformers.LlamaConfig(**sizes, vocab_size=30))
        self.config.cap = None
        self.scale = 0.5
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.criterion = CrossEntropyLoss()
        self.weighted = CrossEntropyLoss(weight=torch.rand(30))

    def hidden(self, tokens):
        return self.model(tokens).last_hidden_state


class Scaled(_Model):
    def forward(self, input_ids, labels=None):
        logits: torch.Tensor = self.lm_head(self.hidden(input_ids)).float().contiguous() * self.scale
        logits = logits / 4
        if (cap := self.config.get_text_config().cap) is not None:
            logits = torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.size(-1))
        return Output(loss=loss, logits=logits)


class Local(_Model):
    """A cap in a local name, as in PaliGemma."""

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        cap = getattr(self.config.get_text_config(), "cap", None)
        if cap is not None:
            logits = torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, 30)
        return Output(loss=loss, logits=logits)


class Criterion(_Model):
    def forward(self, input_ids, labels=None):
        hidden = self.hidden(input_ids)
        hidden = self.lm_head(hidden)
        scores = hidden
        if labels is None:
            return (scores,)
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3)
        labels = labels.to(scores.device)
        loss = criterion(scores.view(-1, scores.shape[-1]), labels.view(-1))
        return (loss, scores) if loss is not None else (scores,)


class Attribute(_Model):
    def forward(self, input_ids, labels=None):
        scores = self.lm_head(self.hidden(input_ids))
        output = (scores,)
        if labels is not None:
            loss = self.criterion(scores.view(-1, self.config.vocab_size), labels.view(-1))
        return ((loss,) + output) if labels is not None else output  # noqa: RUF005 - as transformers has it


class Passed(Scaled):
    def forward(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("cls", [Scaled, Local, Criterion, Attribute, Passed])
def test_forwards_that_are_taken(cls):
    torch.manual_seed(0)
    model, text = cls().train(), torch.arange(12).view(2, 6)
    text[0, 2] = 3
    results = []
    for fused in (False, True):
        (entry,) = patch(
            model, loss=False, attention=False, linear=False, padding=False, fused_loss=fused
        ) or [None]
        assert entry is None or entry.status == "patched", entry.why
        model.zero_grad()
        out = model(text, labels=text)
        out[0].backward()
        logits = out.logits if isinstance(out, dict) else out[1]
        assert (logits is None) is fused
        results.append({n: p.grad for n, p in model.named_parameters()} | {"loss": out[0].detach()})
        assert model.eval()(text)[0].shape == (2, 6, 30)
        model.train()
    torch.testing.assert_close(results[1], results[0])
    if cls is Passed:
        assert model.calls == 4


class LossAlone(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        return logits if labels is None else self.loss_function(logits, labels, 30)


class Named(NamedTuple):
    loss: torch.Tensor
    hidden: torch.Tensor


class WithoutLogits(_Model):
    def forward(self, input_ids, labels=None):
        hidden = self.hidden(input_ids)
        return Named(self.loss_function(self.lm_head(hidden), labels, 30), hidden)


class Listed(_Model):
    def forward(self, input_ids, labels=None):
        hidden = self.hidden(input_ids)
        return [self.loss_function(self.lm_head(hidden), labels, 30), hidden]


class Nested(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        return self.loss_function(logits, labels, 30), (logits,)


class Dictionary(dict):
    pass


class NotYet(_Model):
    def forward(self, input_ids, labels=None):
        logits, loss = self.lm_head(self.hidden(input_ids)), None
        if input_ids is None:
            loss = self.loss_function(logits, labels, 30)
        return Dictionary(loss=loss, logits=logits)


class Views(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        b, t, v = logits.shape
        loss = self.criterion(logits.view(b * t, v), labels.view(-1))
        loss = loss + self.criterion(logits.view((-1, 30)), labels.view(-1))
        loss = loss + self.criterion(logits.view(labels.numel(), -1), labels.view(-1))
        return loss, logits


class Itself(_Model):
    """What a forward does with the model itself."""

    def forward(self, input_ids, labels=None):
        self.last = self.hidden(input_ids)
        logits = self.lm_head(self.last)
        del self.last
        return self.loss_function(logits, labels, 30), logits


@pytest.mark.parametrize("cls", [LossAlone, WithoutLogits, Listed, Nested, NotYet, Views, Itself])
def test_what_a_forward_returns(cls):
    torch.manual_seed(0)
    text, model = torch.arange(12).view(2, 6), cls().train()
    wanted = model(text, labels=text)
    assert patch(model, fused_loss=True)[0].status == "patched"
    got = model(text, labels=text)
    assert type(got) is type(wanted)
    match got:
        case (_, (None,)) | (_, None):
            got, wanted = got[0], wanted[0]
    torch.testing.assert_close(got, wanted)


def test_logits_that_are_not_rows_of_classes():
    """The classes of torch's cross-entropy are the second dimension; there are as many positions."""

    class Rows(_Model):
        def forward(self, input_ids, labels=None):
            logits = self.lm_head(self.hidden(input_ids))
            return self.criterion(logits, labels), logits

    text, model = torch.arange(30)[None], Rows().train()
    assert patch(model, fused_loss=True)[0].status == "patched"
    with pytest.raises(TypeError, match="UncomputedLogits"):
        model(text, labels=text)


class ReadsThem(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        loss = self.loss_function(logits, labels, 30)
        return Output(loss=loss + 0.1 * logits.logsumexp(-1).mean(), logits=logits)


class Alias(_Model):
    def forward(self, input_ids, labels=None):
        scores = logits = self.lm_head(self.hidden(input_ids))
        loss = self.loss_function(logits, labels, 30)
        return Output(loss=loss + scores.mean(), logits=logits)


class Writes(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        logits[..., 0] = 0
        return Output(loss=self.loss_function(logits, labels, 30), logits=logits)


class WritesTimes(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        logits *= 2
        return Output(loss=self.loss_function(logits, labels, 30), logits=logits)


class Slices(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        loss = self.criterion(logits[:, :-1].reshape(-1, 30), labels[:, 1:].flatten())
        return Output(loss=loss, logits=logits)


class Temperature(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids)) * self.temperature
        return Output(loss=self.loss_function(logits, labels, 30), logits=logits)


class Weighted(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        return Output(loss=self.weighted(logits.view(-1, 30), labels.view(-1)), logits=logits)


class WeightedHere(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        criterion = CrossEntropyLoss(weight=self.weighted.weight)
        return Output(loss=criterion(logits.view(-1, 30), labels.view(-1)), logits=logits)


class OnlyInOneBranch(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        if input_ids is None:
            logits = None
        else:
            logits.tanh_()
        return Output(loss=self.loss_function(logits, labels, 30), logits=logits)


class Changes(_Model):
    def forward(self, input_ids, labels=None):
        logits, cap = self.lm_head(self.hidden(input_ids)), None
        cap = self.config.cap
        if labels is None:
            cap = 3.0
        if cap is not None:
            logits = torch.tanh(logits)
        return Output(loss=self.loss_function(logits, labels, 30), logits=logits)


class Walrus(_Model):
    def forward(self, input_ids, labels=None):
        cap = None
        logits = self.lm_head(self.hidden(cap := input_ids))
        if cap is not None:
            logits = torch.tanh(logits)
        return Output(loss=self.loss_function(logits, labels, 30), logits=logits)


class Index(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        loss = (self.loss_function, self.criterion)[logits](labels, labels, 30)
        return Output(loss=loss, logits=logits)


class Counts(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        cap = None
        for cap in (1.0, 2.0):  # noqa: B007
            pass
        if cap is not None:
            logits = torch.tanh(logits)
        return Output(loss=self.loss_function(logits, labels, 30), logits=logits)


class NamedAsABuiltin(_Model):
    def forward(self, input_ids, labels=None, max=None):
        logits = self.lm_head(self.hidden(input_ids))
        if max is None:
            logits = torch.tanh(logits)
        return Output(loss=self.loss_function(logits, labels, 30), logits=logits)


class Inside(_Model):
    def forward(self, input_ids, labels=None):
        with torch.no_grad():
            logits = self.lm_head(input_ids)
        return Output(loss=self.loss_function(logits, labels, 30), logits=logits)


class Later(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        self.last = lambda: logits
        return Output(loss=self.loss_function(logits, labels, 30), logits=logits)


class Keeps(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        self.last = logits
        return Output(loss=self.loss_function(logits, labels, 30), logits=logits)


class Compares(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids))
        loss = self.loss_function(logits, labels, 30) if (logits > 0).any() else None
        return Output(loss=loss, logits=logits)


class NoLoss(_Model):
    def forward(self, input_ids, labels=None):
        return Output(loss=labels.sum(), logits=self.lm_head(self.hidden(input_ids)))


class NoHead(_Model):
    def forward(self, input_ids, labels=None):
        logits = F.linear(self.hidden(input_ids), self.lm_head.weight)
        return Output(loss=self.loss_function(logits, labels, 30), logits=logits)


class OwnClass(_Model):
    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.hidden(input_ids) * isinstance(self, OwnClass))
        return self.loss_function(logits, labels, 30), logits


class Super(_Model):
    def forward(self, input_ids, labels=None):
        out = super().forward(input_ids, labels=labels)
        return Output(loss=out.loss, logits=out.logits.exp())


class Around(Scaled):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return Output(loss=out.loss, logits=out.logits.exp())


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (ReadsThem, "needs the logits for `logits.logsumexp(-1)`"),
        (Alias, "needs the logits for `scores.mean()`"),
        (Writes, "needs the logits for `logits[..., 0]`"),
        (WritesTimes, "needs the logits for `logits *= 2`"),
        (Slices, "needs the logits for `logits[:, :-1]`"),
        (Temperature, "needs the logits for `self.lm_head(self.hidden(input_ids)) * self.temperature`"),
        (Weighted, "needs the logits for `self.weighted(logits.view(-1, 30), labels.view(-1))`"),
        (WeightedHere, "needs the logits for `criterion(logits.view(-1, 30), labels.view(-1))`"),
        (OnlyInOneBranch, "needs the logits for `logits.tanh_()`"),
        (Changes, "needs the logits for `torch.tanh(logits)`"),
        (Walrus, "needs the logits for `torch.tanh(logits)`"),
        (Index, "needs the logits for `(self.loss_function, self.criterion)[logits]`"),
        (Counts, "needs the logits for `torch.tanh(logits)`"),
        (NamedAsABuiltin, "needs the logits for `torch.tanh(logits)`"),
        (Inside, "needs the logits for `with torch.no_grad(): logits = self.lm_head(input_ids)`"),
        (Later, "needs the logits for `lambda: logits`"),
        (Keeps, "needs the logits for `self.last`"),
        (Compares, "needs the logits for `logits > 0`"),
        (NoLoss, "computes no cross-entropy of them"),
        (NoHead, "does not call lm_head"),
        (Super, "calls that of a base class"),
        (OwnClass, "asks for its own class"),
        (Around, "may use the logits"),
    ],
)  # fmt: skip
def test_forwards_that_are_refused(cls, why):
    (entry,) = patch(cls(), loss=False, attention=False, linear=False, padding=False, fused_loss=True)
    assert (entry.status, entry.why) == ("refused", f"the forward of {cls.__name__} {why}")


@pytest.mark.parametrize("cls", [Scaled, Local])
def test_an_option_that_decides(cls):
    """A branch on the configuration counts where it is taken; set later, it is an error and no wrong loss."""
    text = torch.arange(12).view(2, 6)
    model = cls().train()
    model.config.cap = 30.0
    why = patch(model, fused_loss=True)[0].why
    assert why == f"the forward of {cls.__name__} needs the logits for `torch.tanh(logits / cap)`"
    model.config.cap = None
    assert patch(model, fused_loss=True)[0].status == "patched"
    model.config.cap = 30.0
    with pytest.raises(TypeError, match="UncomputedLogits"):
        model(text, labels=text)


def test_a_forward_without_source():
    names = {"Output": Output}
    exec("def forward(self, input_ids, labels=None): return Output(loss=labels.sum())", names)
    cls = type("Made", (_Model,), {"forward": names["forward"]})
    report = patch(cls(), fused_loss=True)
    assert report[0].why == "the forward of Made has no source to be read"
