"""Trials of the pairwise launchers: their inputs, and what float64 says of the results."""

import torch
from torch.nn.functional import cross_entropy, softplus

from vlmkernels.ops._pairwise import inverse_norms
from vlmkernels.reference.linear_distillation import linear_distillation_bwd, linear_distillation_fwd
from vlmkernels.testing import unit_features
from vlmkernels.triton import _contrastive_distillation_bwd as distilled_bwd
from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import contrastive_distillation as distilled
from vlmkernels.triton import info_nce, linear_cross_entropy, linear_distillation, sigmoid_loss

from .trials import judge, strided, widened


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
        self.a = inverse_norms(self.query, normalize)
        self.b = inverse_norms(self.key, normalize)
        self.positives = torch.randint(0, m, (n,))
        self.positives[::5] = -1
        self.dtype = dtype
        self.tf32 = tf32
        self.work = torch.promote_types(dtype, torch.float32)

    def features(self, work):
        q, k = self.query.to(work), self.key.to(work)
        return (q, k) if self.a is None else (q * self.a.to(work)[:, None], k * self.b.to(work)[:, None])

    def rounded(self, x, work, gain=1.0):
        """What enters a product: the dtype of the features, unless `work` is for the truth."""
        return x if work == torch.float64 else (x * gain).to(self.dtype).to(work) / gain

    def cosines(self, work):
        """The products of the kernels, which under TF32 read ten bits of each mantissa."""
        q, k = self.query.to(work), self.key.to(work)
        if self.tf32 and work == torch.float32:
            q, k = ((x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (q, k))
        s = q @ k.T
        return s if self.a is None else s * self.a.to(work)[:, None] * self.b.to(work)

    def logits(self, work):
        return self.scale.to(work) * self.cosines(work)

    def stats(self, work):
        s = self.logits(work)
        positive = s.gather(1, self.positives.clamp_min(0)[:, None])[:, 0]
        out = [positive[self.positives >= 0]]
        for dim in (1, 0):
            below = s - s.amax(dim, keepdim=True)
            out += [s.logsumexp(dim), s.amax(dim), (s.softmax(dim) * below).sum(dim)]
        return out

    def feature_grad(self, total, x, inv, work):
        x, inv = x.to(work), None if inv is None else inv.to(work)[:, None]
        dot = (x * total).sum(1)
        scale = self.scale.to(work)
        grad = scale * total if inv is None else scale * inv * (total - inv * inv * dot[:, None] * x)
        return (grad if work == torch.float64 else grad.to(self.dtype)), dot

    def grads(self, work, row_max, row_log, col_max, col_log, u, v, w, query_extra, key_extra):
        q, k = self.features(work)
        s = self.logits(work)
        g = u.to(work)[:, None] * (s - row_max.to(work)[:, None] - row_log.to(work)[:, None]).exp()
        if v.numel():
            g = g + v.to(work) * (s - col_max.to(work) - col_log.to(work)).exp()
        hit = self.positives[:, None] == torch.arange(len(k))
        gain = (
            2.0**14 / max(u.abs().max(), v.abs().max() if v.numel() else 0)
            if self.dtype == torch.float16
            else 1.0
        )
        g = self.rounded(g.masked_fill(hit, 0), work, gain)
        weights = hit * w.to(work)[:, None]
        out = []
        for extra, x, inv, products, positives in (
            (query_extra, self.query, self.a, g @ self.rounded(k, work), weights @ k),
            (key_extra, self.key, self.b, g.T @ self.rounded(q, work), weights.T @ q),
        ):
            total = products + positives + (0 if extra is None else extra.to(work))
            out.extend(self.feature_grad(total, x, inv, work))
        return out[0], out[2], out[1], out[3]

    def sigmoid(self, work, bias, same, u):
        q, k = self.features(work)
        cosine = self.cosines(work)
        z = self.scale.to(work) * cosine + bias.to(work)
        x = torch.where(same, -z, z)
        g = torch.where(same, -u.to(work)[:, None], u.to(work)[:, None]) * x.sigmoid()
        gain = 2.0**14 / u.abs().max() if self.dtype == torch.float16 else 1.0
        low = self.rounded(g, work, gain)
        dquery = self.feature_grad(low @ self.rounded(k, work), self.query, self.a, work)[0]
        dkey = self.feature_grad(low.T @ self.rounded(q, work), self.key, self.b, work)[0]
        return softplus(x, threshold=1e9).sum(1), dquery, dkey, (g * cosine).sum(1), g.sum(1)


class Stats:
    """info_nce_stats."""

    def __init__(self, problem: Problem, *, columns=True, workspace_bytes=1 << 28):
        self.problem, self.options = problem, (columns, 0, workspace_bytes)

    def launch(self):
        p = self.problem
        return info_nce.info_nce_stats(p.query, p.key, p.scale, p.a, p.b, p.positives, *self.options)

    def finished(self, got):
        """Positives, then log-sum-exp, maximum and mean below the maximum of rows and of columns."""
        *rows, positive, col_max, col_sum, col_moment, store = got
        p, columns = self.problem, self.options[0]
        assert store.numel() == 0
        assert (positive[p.positives < 0] == -float("inf")).all()
        assert columns or col_max.numel() == col_sum.numel() == col_moment.numel() == 0
        out = [positive[p.positives >= 0]]
        for high, total, moment in (rows, (col_max, col_sum, col_moment))[: 1 + columns]:
            out += [high + total.log(), high, moment / total]
        return out

    def judge(self, got):
        p, got = self.problem, self.finished(got)
        names = ("positive", "row lse", "row max", "row mean", "col lse", "col max", "col mean")
        low, exact = p.stats(p.work), p.stats(torch.float64)
        count = len(got)
        judge(names[:count], got, low[:count], exact[:count])


class Grads:
    """info_nce_grads."""

    def __init__(
        self, problem: Problem, *, columns=True, workspace_bytes=1 << 28, extra=False, needs=(True, True)
    ):
        self.problem = p = problem
        n, m, work = len(p.query), len(p.key), p.work
        _, row_lse, row_max, _, col_lse, col_max, _ = p.stats(torch.float64)
        stats = [x.to(work) for x in (row_max, row_lse - row_max, col_max, col_lse - col_max)]
        u, v, w = (
            x / n for x in (torch.rand(n, dtype=work), torch.rand(m, dtype=work), torch.randn(n, dtype=work))
        )
        if not columns:
            stats[2], stats[3], v = stats[2][:0], stats[3][:0], v[:0]
        extras = [torch.randn(x.shape, dtype=work) / n if extra else None for x in (p.query, p.key)]
        self.arguments = (*stats, u, v, w, *extras)
        self.workspace_bytes, self.needs = workspace_bytes, needs

    def launch(self):
        p, store = self.problem, torch.empty(0, dtype=torch.uint8)
        return info_nce.info_nce_grads(
            p.query, p.key, p.scale, p.a, p.b, p.positives, *self.arguments, store, self.workspace_bytes,
            *self.needs,
        )  # fmt: skip

    def judge(self, got):
        low, exact = (
            self.problem.grads(work, *self.arguments) for work in (self.problem.work, torch.float64)
        )
        judge(("dquery", "dkey", "query_dot", "key_dot"), got, low, exact, self.needs * 2)


class Sigmoid:
    """sigmoid_sweep, with the positives by index or by equal ids."""

    def __init__(self, problem: Problem, *, bias=-1.0, ids=False, needs=(True, True, True, True)):
        self.problem, self.needs = problem, needs
        n, m = len(problem.query), len(problem.key)
        self.bias = torch.tensor([bias], dtype=problem.work)
        self.u = torch.rand(n, dtype=problem.work) / n
        if ids:
            query_ids, key_ids = torch.randint(0, 9, (n,)), torch.randint(0, 9, (m,))
            self.pairs, self.same = (None, query_ids, key_ids), query_ids[:, None] == key_ids
        else:
            self.pairs = (problem.positives, None, None)
            self.same = problem.positives[:, None] == torch.arange(m)

    def launch(self):
        p = self.problem
        return sigmoid_loss.sigmoid_sweep(
            p.query, p.key, p.scale, self.bias, p.a, p.b, *self.pairs, self.u, *self.needs
        )

    def judge(self, got):
        p, rest = self.problem, (self.bias, self.same, self.u)
        names = ("loss", "dquery", "dkey", "dscale", "dbias")
        judge(
            names,
            got,
            p.sigmoid(p.work, *rest),
            p.sigmoid(torch.float64, *rest),
            (*self.needs, self.needs[3]),
        )


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
            x, y = ((z.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) for z in (x, y))
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


class Finish:
    """finish, the last step of a gradient, for features wider than one program holds at once."""

    def __init__(
        self, rows, others, depth, dtype, *, normalize, by_key, extra=False, gain=False, positives=True
    ):
        self.x, self.y = strided(torch.randn(rows, depth).to(dtype)), torch.randn(others, depth).to(dtype)
        self.a, self.b = (torch.rand(len(x)) + 0.5 if normalize else None for x in (self.x, self.y))
        self.acc, self.scale = torch.randn(rows, depth), torch.tensor(3.0)
        self.extra = torch.randn(rows, depth) if extra else None
        self.inv_gain = torch.tensor(0.25) if gain else None
        pairs = torch.randint(-1, rows if by_key else others, (others if by_key else rows,))
        pairs[0] = -1
        self.hit = (
            (pairs == torch.arange(rows)[:, None]) if by_key else pairs[:, None] == torch.arange(others)
        )
        self.coef, self.index, self.first = torch.randn(len(pairs)), pairs, None
        self.by_key, self.positives = by_key, positives
        if by_key:
            ordered, self.index = pairs.sort(stable=True)
            self.first = torch.searchsorted(ordered, torch.arange(rows + 1))
        if not positives:
            self.coef = self.index = self.first = None

    def launch(self):
        return pairwise.finish(
            self.acc.clone(), self.inv_gain, self.extra, self.x, self.y, self.scale, self.a, self.b,
            self.coef, self.index, self.first,
        )  # fmt: skip

    def exact(self, work):
        x, y, acc = (t.to(work) for t in (self.x, self.y, self.acc))
        a, b = (
            torch.ones(len(t), dtype=work) if w is None else w.to(work) for t, w in ((x, self.a), (y, self.b))
        )
        total = acc * (1 if self.inv_gain is None else self.inv_gain.to(work))
        if self.extra is not None:
            total = total + self.extra.to(work)
        if self.positives:
            coef = self.coef.to(work)
            total = total + (self.hit * (coef if self.by_key else coef[:, None]) * b) @ y
        dot = (x * total).sum(1)
        if self.a is None:
            return self.scale.to(work) * total, dot
        a = a[:, None]
        return self.scale.to(work) * a * (total - a * a * dot[:, None] * x), dot

    def judge(self, got):
        low, exact = self.exact(torch.float32), self.exact(torch.float64)
        judge(("dx", "dot"), got, (low[0].to(self.x.dtype), low[1]), exact)
