"""Trials of the pairwise launchers: their inputs, and what float64 says of the results."""

import torch
from torch.nn.functional import cross_entropy, softplus

from vlmkernels.ops._pairwise import inverse_norms
from vlmkernels.reference.linear_distillation import linear_distillation_bwd, linear_distillation_fwd
from vlmkernels.testing import unit_features
from vlmkernels.triton import _ahead, info_nce, linear_cross_entropy, linear_distillation, sigmoid_loss
from vlmkernels.triton import _contrastive_distillation_bwd as distilled_bwd
from vlmkernels.triton import _info_nce_bwd as info_nce_bwd
from vlmkernels.triton import contrastive_distillation as distilled

from .trials import judge, strided, widened


def with_ten_bits(x):
    """Float32 as products under TF32 read it."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


class Problem:
    """Inputs of the building blocks, and the blocks themselves in plain PyTorch."""

    def __init__(
        self,
        n,
        m,
        d,
        dtype,
        *,
        normalize=False,
        scale=10.0,
        scale_dtype=torch.float32,
        offset=0.0,
        tf32=False,
    ):
        query, key = unit_features(n, m, d, dtype=torch.float64)
        if normalize:
            query, key = query * torch.rand(n, 1).add(0.5) * 3, key * torch.rand(m, 1).add(0.5) * 3
        self.query, self.key = strided((query + offset).to(dtype)), (key - offset).to(dtype)
        self.scale = torch.tensor(scale, dtype=scale_dtype)
        self.normalize = normalize
        self.positives = torch.randint(0, m, (n,))
        self.positives[::5] = -100
        self.dtype = dtype
        self.tf32 = tf32
        self.work = torch.promote_types(dtype, torch.float32)

    def inverse(self, x, work):  # [rows, 1]
        """Inverse norms, or None."""
        norms = inverse_norms(x.to(work), self.normalize)
        return None if norms is None else norms[:, None]

    def features(self, work):
        a, b = (self.inverse(x, work) for x in (self.query, self.key))
        q, k = self.query.to(work), self.key.to(work)
        return (q, k) if a is None else (q * a, k * b)

    def rounded(self, x, work, gain=1.0):
        """What enters a product: the dtype of the features, or TF32, unless `work` is for the truth."""
        if work == torch.float64:
            return x
        return with_ten_bits(x) if self.tf32 else (x * gain).to(self.dtype).to(work) / gain

    def cosines(self, work, order=slice(None)):
        """The products of the kernels, which under TF32 read ten bits of each mantissa.

        With the features in another order, which rounds otherwise.
        """
        q, k = self.query.to(work)[:, order], self.key.to(work)[:, order]
        if self.tf32 and work == torch.float32:
            q, k = with_ten_bits(q), with_ten_bits(k)
        a, b = (self.inverse(x, work) for x in (self.query, self.key))
        return q @ k.T if a is None else (q @ k.T) * a * b.T

    def logits(self, work):
        return self.scale.to(work) * self.cosines(work)

    def orders(self):
        """Of the features, the first as they are."""
        return [slice(None), *(torch.randperm(self.query.shape[1]) for _ in range(7))]

    def feature_grad(self, total, x, work):
        x, scale, inv = x.to(work), self.scale.to(work), self.inverse(x, work)
        dot = (x * total).sum(1)[:, None]
        grad = scale * total if inv is None else scale * inv * (total - inv * inv * dot * x)
        return grad if work == torch.float64 else grad.to(self.dtype)

    def feature_grads(self, g, kept, unit, work):
        """From gradients of logits, which round at `unit`, and those that are kept out of products."""
        q, k = self.features(work)
        unit = torch.where(unit > 0, unit, 1)
        low = unit * self.rounded(g / unit, work, 2.0**14 if self.dtype == torch.float16 else 1.0)
        dquery = low @ self.rounded(k, work) + kept @ k
        dkey = low.T @ self.rounded(q, work) + kept.T @ q
        return self.feature_grad(dquery, self.query, work), self.feature_grad(dkey, self.key, work)

    def positive(self, form):
        """The arguments `positives` and `key_ids`, and which pairs they name."""
        n, m = len(self.query), len(self.key)
        if form == "pairs":
            return (None, None), torch.eye(n, m, dtype=torch.bool)
        if form == "index":
            return (self.positives, None), self.positives[:, None] == torch.arange(m)
        query_ids, key_ids = torch.randint(0, 9, (n,)), torch.randint(0, 9, (m,))
        query_ids[3::17], key_ids[5::29] = -1, -2
        return (query_ids, key_ids), query_ids[:, None] == key_ids


def judge_with_scalars(names, got, lows, exact, needs):
    """The result with the features in each order counts for a scalar, the first for all others."""
    low = [list(of_each) if of_each[0].dim() == 0 else of_each[0] for of_each in zip(*lows, strict=True)]
    got = [
        x.reshape(()).to(lows[0][0].dtype) if need and truth.dim() == 0 else x
        for x, truth, need in zip(got, exact, needs, strict=True)
    ]
    judge(names, got, low, exact, needs)


class InfoNCE:
    """info_nce and its backward."""

    def __init__(
        self,
        problem: Problem,
        *,
        form="pairs",
        symmetric=True,
        smoothing=0.0,
        weighted=False,
        reduction="mean",
        store_bytes=1 << 28,
        needs=(True, True, True),
    ):
        self.problem, self.needs, n = problem, needs, len(problem.query)
        self.pairs, self.hit = problem.positive(form)
        self.kept = form == "pairs"
        self.weight = torch.rand(n).index_fill(0, torch.arange(0, n, 7), 0) if weighted else None
        self.dloss = torch.randn(n if reduction == "none" else (), dtype=problem.work)
        self.options = (symmetric, smoothing, problem.normalize, reduction, store_bytes)

    def launch(self):
        p = self.problem
        inputs = (p.query, p.key, p.scale, *self.pairs, self.weight)
        loss, *stats = info_nce.info_nce(*inputs, *self.options)
        return loss, *info_nce_bwd.info_nce_bwd(self.dloss, *inputs, *stats, *self.options, self.needs)

    def exact(self, work, order=slice(None)):
        symmetric, smoothing, _, reduction, _ = self.options
        p, dloss = self.problem, self.dloss.to(work)
        cosine = p.cosines(work, order)
        s = p.scale.to(work) * cosine
        loss, g, unit = 0, torch.zeros_like(s), 0
        for dim in (1, 0)[: 1 + symmetric]:
            count = self.hit.sum(dim, keepdim=True).to(work)
            target = (1 - smoothing) * self.hit / count.clamp_min(1) + smoothing / s.shape[dim]
            target = torch.where(count > 0, target, 0)
            weight = (count > 0).to(work).squeeze(dim)
            weight = weight if self.weight is None else weight * self.weight.to(work)
            mass = weight.sum() if reduction == "mean" and weight.sum() > 0 else 1.0
            share = (0.5 if symmetric else 1.0) / mass
            each = share * weight * -(target * s.log_softmax(dim)).sum(dim)
            loss = loss + (each if reduction == "none" else each.sum())
            u = share * weight * dloss
            g += u.unsqueeze(dim) * (s.softmax(dim) - target)
            unit += u.abs().max()
        kept = g * (self.hit & self.kept)
        return loss, *p.feature_grads(g - kept, kept, unit, work), (g * cosine).sum()

    def judge(self, got):
        p = self.problem
        assert got[3].dtype == p.scale.dtype
        lows = [self.exact(p.work, order) for order in p.orders()]
        names = ("loss", "dquery", "dkey", "dscale")
        judge_with_scalars(names, got, lows, self.exact(torch.float64), (True, *self.needs))


class Sigmoid:
    """sigmoid_loss with the gradients that it forms ahead, and its backward."""

    def __init__(
        self, problem: Problem, *, bias=-1.0, form="index", reduction="mean", needs=(True, True, True, True)
    ):
        self.problem, self.needs = problem, needs
        self.bias = torch.tensor([bias], dtype=problem.work)
        self.pairs, self.same = problem.positive(form)
        self.options = (problem.normalize, reduction)
        self.dloss = torch.randn(len(problem.query) if reduction == "none" else (), dtype=problem.work)

    def launch(self):
        p = self.problem
        inputs = (p.query, p.key, p.scale, self.bias, *self.pairs, *self.options)
        ahead = (*self.needs[:2], self.needs[2] or self.needs[3])
        loss, *formed = sigmoid_loss.sigmoid_loss(*inputs, *ahead)
        return loss, *formed, *sigmoid_loss.sigmoid_loss_bwd(self.dloss, *inputs, self.needs)

    def exact(self, work, order=slice(None)):
        p = self.problem
        cosine = p.cosines(work, order)
        z = p.scale.to(work) * cosine + self.bias.to(work)
        x = torch.where(self.same, -z, z)
        losses = softplus(x, threshold=1e9).sum(1)
        share, each = (1 / len(z) if self.options[1] == "mean" else 1.0), self.options[1] == "none"
        out = [losses if each else share * losses.sum()]
        for dloss in (torch.ones(()), self.dloss):
            u = share * dloss.to(work).expand(len(z))[:, None]
            g = torch.where(self.same, -u, u) * x.sigmoid()
            unit = torch.ones(()) if dloss.dim() and p.dtype != torch.float16 else u.abs().max()
            out += [
                *p.feature_grads(g, torch.zeros_like(g), unit.to(work), work),
                (g * cosine).sum(),
                g.sum(),
            ]
        return out

    def judge(self, got):
        p = self.problem
        lows = [self.exact(p.work, order) for order in p.orders()]
        names = ("dquery", "dkey", "dscale", "dbias")
        both = self.needs[2] or self.needs[3]
        needs = (True, *self.needs[:2], both, both, *self.needs)
        names = ("loss", *(f"{name} formed ahead" for name in names), *names)
        judge_with_scalars(names, got, lows, self.exact(torch.float64), needs)


class Distillation:
    """contrastive_distillation and its backward."""

    def __init__(
        self,
        n,
        m,
        d,
        e,
        dtype,
        *,
        symmetric=True,
        divergence="kl",
        reduction="mean",
        store_bytes=1 << 28,
        needs=(True, True, True),
        scale=10.0,
        teacher_scale=20.0,
        scale_dtype=torch.float32,
        near=None,
        tf32=False,
    ):
        query, key = unit_features(n, m, d, dtype=torch.float64)
        if near is None:
            teacher = unit_features(n, m, e, dtype=dtype)
        else:
            teacher = ((x + near * torch.randn(x.shape)).to(dtype) for x in (query, key))
        self.teacher_query, self.teacher_key = (strided(x) for x in teacher)
        self.query, self.key = strided(query.to(dtype)), key.to(dtype)
        self.scale = torch.tensor(scale, dtype=scale_dtype)
        self.teacher_scale = torch.tensor([teacher_scale])
        self.dloss = torch.randn(n if reduction == "none" else ())
        self.options = (symmetric, divergence, reduction, store_bytes)
        self.dtype, self.needs, self.tf32 = dtype, needs, tf32

    @property
    def tensors(self):
        student = (self.query, self.key, self.scale)
        return *student, self.teacher_query, self.teacher_key, self.teacher_scale

    def launch(self):
        loss, *stats = distilled.contrastive_distillation(*self.tensors, *self.options)
        return loss, *distilled_bwd.contrastive_distillation_bwd(
            self.dloss, *self.tensors, *stats, *self.options, self.needs
        )

    def multiplied(self, x, y, work, order):
        """The product of the kernels, which under TF32 reads ten bits of each mantissa."""
        x, y = x.to(work)[:, order], y.to(work)[:, order]
        if self.tf32 and work == torch.float32:
            x, y = with_ten_bits(x), with_ten_bits(y)
        return x @ y.T

    def exact(self, work, shuffled=False):
        """With `shuffled`, features in another order, which rounds otherwise."""
        symmetric, divergence, reduction, _ = self.options
        query, key, scale, teacher_query, teacher_key, teacher_scale = self.tensors
        student, teacher = (
            torch.randperm(x.shape[1]) if shuffled else slice(None) for x in (query, teacher_query)
        )
        cosine = self.multiplied(query, key, work, student)
        s = scale.to(work) * cosine
        t = teacher_scale.to(work) * self.multiplied(teacher_query, teacher_key, work, teacher)
        share, dloss = 0.5 if symmetric else 1.0, self.dloss.to(work)
        loss, g, unit = 0, torch.zeros_like(s), 0
        for dim in (1, 0)[: 1 + symmetric]:
            log_s, log_p = s.log_softmax(dim), t.log_softmax(dim)
            each = (log_p.exp() * (log_p - log_s if divergence == "kl" else -log_s)).sum(dim)
            weight = share / len(each) if reduction == "mean" else share
            loss = loss + weight * (each if reduction == "none" else each.sum())
            g += weight * dloss.expand(len(each)).unsqueeze(dim) * (log_s.exp() - log_p.exp())
            unit += weight * self.dloss.abs().max().item()
        rounded = g
        if work != torch.float64:  # what enters a product
            gain = 2.0**14 / unit if self.dtype == torch.float16 else 1.0
            rounded = (g * gain).to(self.dtype).to(work) / gain
        grads = (scale.to(work) * (rounded @ key.to(work)), scale.to(work) * (rounded.T @ query.to(work)))
        grads = grads if work == torch.float64 else (x.to(self.dtype) for x in grads)
        return loss, *grads, (g * cosine).sum()

    def judge(self, got):
        work = torch.promote_types(self.dtype, torch.float32)
        low, *others = (self.exact(work, shuffled=i > 0) for i in range(8))
        scalars = [i for i, x in enumerate(low) if x.dim() == 0]
        low = [[x, *(other[i] for other in others)] if i in scalars else x for i, x in enumerate(low)]
        *got, dscale = got
        assert dscale.dtype == self.scale.dtype
        names = ("loss", "dquery", "dkey", "dscale")
        judge(names, (*got, dscale.to(work)), low, self.exact(torch.float64), (True, *self.needs))


class CrossEntropy:
    """linear_cross_entropy_sweep; rows that do not count hold NaN."""

    def __init__(
        self,
        n,
        classes,
        d,
        dtype,
        *,
        bias=False,
        column_scale=False,
        smoothing=0.0,
        ignored=0.3,
        spread=1.0,
        needs=(True, True, True),
    ):
        self.hidden = strided(torch.randn(n, d).to(dtype))
        self.weight = (spread * torch.randn(classes, d) / d**0.5).to(dtype)
        self.target = torch.randint(0, classes, (n,))
        self.target[torch.rand(n) < ignored] = -1
        self.hidden[self.target < 0] = float("nan")
        self.bias = torch.randn(classes, 2).to(dtype)[:, 0] if bias else None
        self.column_scale = torch.rand(classes, 2)[:, 1] if column_scale else None
        self.u = torch.rand(n, dtype=torch.promote_types(dtype, torch.float32)) / n
        self.smoothing, self.needs = smoothing, needs

    def launch(self):
        return linear_cross_entropy.linear_cross_entropy_sweep(
            self.hidden, self.weight, self.target, self.bias, self.column_scale, self.u, self.smoothing,
            *self.needs,
        )  # fmt: skip

    def exact(self, work):
        dtype, classes = self.weight.dtype, len(self.weight)
        counted, w = (self.target >= 0)[:, None], self.weight.to(work)
        h = self.hidden.where(counted, 0).to(work)
        scale = torch.ones(classes) if self.column_scale is None else self.column_scale
        z = (h @ w.T + (0 if self.bias is None else self.bias.to(work))) * scale.to(work)
        q = (self.target[:, None] == torch.arange(classes)).to(work)
        q = (1 - self.smoothing) * q + self.smoothing / classes
        loss = cross_entropy(z, self.target.clamp_min(0), reduction="none", label_smoothing=self.smoothing)
        g = self.u.to(work)[:, None] * (z.softmax(1) - q) * scale.to(work)
        loss, g = loss.where(counted[:, 0], 0), g.where(counted, 0)
        if work != torch.float64:  # what enters a product
            gain = 2.0**14 / (self.u * scale.max()).max() if dtype == torch.float16 else 1.0
            g = (g * gain).to(dtype).to(work) / gain
        grads = (g @ w, g.T @ h, g.sum(0))
        return loss, *(grads if work == torch.float64 else (x.to(dtype) for x in grads))

    def judge(self, got):
        low, exact = self.exact(self.u.dtype), self.exact(torch.float64)
        judge(("loss", "dhidden", "dweight", "dbias"), got, low, exact, (True, *self.needs))


class TwoModels:
    """linear_distillation and its backward; rows that do not count hold NaN."""

    IGNORED = 2  # the target of rows that do not count, although it is a class

    def __init__(
        self,
        n,
        classes,
        d,
        dtype,
        *,
        width=12,
        k=None,  # of an offline teacher
        teacher=None,
        divergence="forward_kl",
        temperature=2.0,
        beta=0.3,
        targets=True,
        hard_weight=0.0,
        ignored=0.3,
        reduction="none",
        std=2.0,
        biases=False,
        needs=(True, True, True),
        ahead=False,  # the forward forms the gradients
    ):
        def layer(depth, dtype):
            hidden = strided(torch.randn(n, depth).to(dtype))
            weight = (std * torch.randn(classes, depth) / depth**0.5).to(dtype)
            return hidden, weight, torch.randn(classes, 2).to(dtype)[:, 0] if biases else None

        self.hidden, self.weight, self.bias = layer(d, dtype)
        self.teacher_hidden, self.teacher_weight, self.teacher_bias = layer(width, teacher or dtype)
        self.log_probs = self.indices = self.target = None
        if k is not None:
            self.teacher_hidden = self.teacher_weight = self.teacher_bias = None
            p = (std * torch.randn(n, classes) / temperature).log_softmax(1)
            self.log_probs, self.indices = p.topk(k)
        if targets:
            self.target = torch.randint(0, classes - 1, (n,))
            self.target += self.target >= self.IGNORED
            if k:
                self.target[::2] = self.indices[::2, 0]
            self.target[torch.rand(n) < ignored] = self.IGNORED
            self.indices = None if k is None else self.indices.where(self.counted()[:, None], -1)
            for x in (self.hidden, self.teacher_hidden, self.log_probs):
                if x is not None:
                    x[~self.counted()] = float("nan")
        self.options = (temperature, divergence, beta, hard_weight, self.IGNORED, reduction)
        self.dloss = torch.rand(n, 2)[:, 0] + 0.5 if reduction == "none" else torch.tensor(0.75)
        self.needs, self.ahead = needs, ahead
        if ahead:
            self.dloss = torch.tensor(1.0)

    def counted(self):
        if self.target is None:
            return torch.ones(len(self.hidden), dtype=torch.bool)
        return self.target != self.IGNORED

    def inputs(self):
        layers = self.hidden, self.weight, self.teacher_hidden, self.teacher_weight
        biases = self.bias, self.teacher_bias
        return *layers, *biases, self.log_probs, self.indices, self.target, *self.options

    def launch(self):
        needs = self.needs if self.ahead else (False, False, False)
        loss, *grads = linear_distillation.linear_distillation(*self.inputs(), *needs)
        if self.ahead:
            return loss, *grads
        return loss, *linear_distillation.linear_distillation_bwd(self.dloss, *self.inputs(), self.needs)

    def exact(self, work):
        h, w, taught, teacher_weight, *biases, log_probs = widened(self.inputs()[:7], work)
        h, eye = h.where(self.counted()[:, None], 0), torch.eye(len(w), dtype=work)
        of_teacher = (None, None) if taught is None else (taught @ teacher_weight.T, eye)
        of_rows = (*biases, log_probs, self.indices, self.target)
        inputs = (h @ w.T, eye, *of_teacher, *of_rows, *self.options)
        loss, *_ = linear_distillation_fwd(*inputs, False, False, False)
        g, *_ = linear_distillation_bwd(self.dloss.to(work), *inputs, (True, False, False))
        dtype = self.hidden.dtype
        if work != torch.float64:  # what enters a product
            gain = 2.0**14 / g.abs().max() if dtype == torch.float16 and g.any() else 1.0
            g = (g * gain).to(dtype).to(work) / gain
        grads = (g @ w, g.T @ h, g.sum(0))
        return loss, *(grads if work == torch.float64 else (x.to(dtype) for x in grads))

    def judge(self, got):
        low, exact = self.exact(torch.float32), self.exact(torch.float64)
        judge(("loss", "dhidden", "dweight", "dbias"), got, low, exact, (True, *self.needs))


class Scaled:
    """scale_grads, for tensors of which the first two are of the dtype."""

    def __init__(self, shapes, dtype):
        self.grads = [
            torch.randn(shape).to(dtype if i < 2 else torch.float32) for i, shape in enumerate(shapes)
        ]
        self.dloss = torch.tensor(1.7)

    def launch(self):
        return list(_ahead.scale_grads(self.dloss, *self.grads))

    def judge(self, got):
        low, exact = (
            [(self.dloss.to(work) * x.to(work)) for x in self.grads]
            for work in (torch.float32, torch.float64)
        )
        judge(("grad",) * len(got), got, [x.to(y.dtype) for x, y in zip(low, self.grads, strict=True)], exact)
