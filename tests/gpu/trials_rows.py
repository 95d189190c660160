"""Trials of the losses of rows: distillation and embedding_distillation."""

import torch

from vlmkernels.reference.distillation import distillation_bwd, distillation_fwd
from vlmkernels.reference.embedding_distillation import embedding_distillation_bwd, embedding_distillation_fwd
from vlmkernels.triton import distillation, embedding_distillation

from .trials import judge, strided, widened


class Logits:
    """distillation and its backward; rows that do not count hold NaN."""

    def __init__(
        self,
        n,
        classes,
        dtype,
        *,
        teacher=None,
        divergence="forward_kl",
        temperature=2.0,
        beta=0.3,
        targets=True,
        hard_weight=0.0,
        ignored=0.3,
        reduction="none",
        std=2.0,
    ):
        self.student = strided((std * torch.randn(n, classes)).to(dtype))
        self.teacher = (std * torch.randn(n, classes)).to(teacher or dtype)
        self.target = None
        if targets:
            self.target = torch.randint(0, classes, (n,))
            self.target[torch.rand(n) < ignored] = -1
            for x in (self.student, self.teacher):
                x[self.target < 0] = float("nan")
        self.options = (temperature, divergence, beta, hard_weight, -1, reduction)
        self.dloss = torch.rand(n, 2)[:, 0] + 0.5 if reduction == "none" else torch.tensor(0.75)

    def launch(self):
        logits = (self.student, self.teacher, self.target)
        loss, stats, _ = distillation.distillation(*logits, *self.options, False)
        grad = distillation.distillation_bwd(self.dloss, *logits, stats, *self.options, [True])
        return loss, grad, stats

    def exact(self, work):
        student, teacher = widened((self.student, self.teacher), work)
        loss, stats, _ = distillation_fwd(student, teacher, self.target, *self.options, False)
        saved = (self.dloss, student, teacher, self.target, stats)
        return loss, distillation_bwd(*saved, *self.options, [True]), stats

    def judge(self, got):
        low, exact = self.exact(torch.float32), self.exact(torch.float64)
        low = (low[0], low[1].to(self.student.dtype))
        judge(("loss", "dstudent"), got[:2], low, exact[:2])


class Features:
    """embedding_distillation and its backward; rows of weight 0 hold NaN."""

    def __init__(
        self,
        n,
        depth,
        dtype,
        *,
        teacher=None,
        distance="l1",
        normalize=True,
        weighted=True,
        reduction="none",
    ):
        self.student = strided(torch.randn(n, depth).to(dtype))
        self.teacher = torch.randn(n, depth).to(teacher or dtype)
        self.weight = None
        if weighted:
            self.weight = torch.rand(n, 2)[:, 1] * (torch.rand(n) < 0.7)
            for x in (self.student, self.teacher):
                x[self.weight == 0] = float("nan")
        self.options = (distance, normalize, reduction)
        self.dloss = torch.rand(n, 2)[:, 0] + 0.5 if reduction == "none" else torch.tensor(0.75)

    def launch(self):
        features = (self.student, self.teacher, self.weight)
        loss, _ = embedding_distillation.embedding_distillation(*features, *self.options, False)
        return loss, embedding_distillation.embedding_distillation_bwd(
            self.dloss, *features, *self.options, [True]
        )

    def exact(self, work):
        features = widened((self.student, self.teacher, self.weight), work)
        loss, _ = embedding_distillation_fwd(*features, *self.options, False)
        return loss, embedding_distillation_bwd(self.dloss, *features, *self.options, [True])

    def judge(self, got):
        low, exact = self.exact(torch.float32), self.exact(torch.float64)
        judge(("loss", "dstudent"), got, (low[0], low[1].to(self.student.dtype)), exact)
