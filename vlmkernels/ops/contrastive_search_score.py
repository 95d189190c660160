"""score = (1 - alpha) p - alpha (largest cosine to the context) + beta softmax(similarity), and the best."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels.ops._retrieval import no_gradients
from vlmkernels.reference.contrastive_search_score import contrastive_search_score_fwd, faults_of


@arguments.public
def contrastive_search_score(
    prob: Tensor,  # [B, k]
    hidden: Tensor,  # [B, k, D]
    context: Tensor,  # [B, t, D]
    similarity: Tensor | None,  # [B, k]
    *,
    alpha: float,
    beta: float,
    context_lengths: Tensor | None = None,  # [B]
) -> tuple[Tensor, Tensor]:  # [B] int64, [B, k]
    """Which of k candidates for the next token MAGIC takes (Su et al. 2022, section 3.2).

    With `beta` 0 it is contrastive search (Su et al. 2022, "A Contrastive Framework for Neural Text
    Generation", section 3.2). With `alpha` and `beta` 0, or one candidate, it is greedy search.

    Args:
        prob: ``[B, k]``, probabilities of the candidates by the language model, of the softmax over its whole
            vocabulary.
        hidden: ``[B, k, D]``, the hidden state of each candidate, after the model's last norm.
        context: ``[B, t, D]``, hidden states of the tokens so far; t may be 0.
        similarity: ``[B, k]``, of each candidate's text to the image, as scaled logits; their softmax over
            the k candidates counts. May be None where `beta` is 0.
        alpha: from 0 to 1, how much a candidate's largest cosine to the context counts. With 0 neither
            `hidden` nor `context` is read.
        beta: how much the image counts. With 0 `similarity` is not read.
        context_lengths: int32 or int64 ``[B]``, how many tokens of the context count, the first ones; clipped
            to ``[0, t]``. The largest cosine to none is 0.

    Returns:
        best: ``[B]`` int64, the candidate with the largest score, of equal ones the first, NaN last.
        score: ``[B, k]``, float32 (float64 if an input is).

        Neither has a gradient. Autocast changes nothing.

    Raises:
        ValueError: naming every invalid argument.
    """
    faults = faults_of(prob, hidden, context, similarity, context_lengths, alpha, beta)
    floats = {"prob": prob, "hidden": hidden, "context": context}
    if similarity is not None:
        floats["similarity"] = similarity
    faults += arguments.dtype_faults(floats)
    faults += arguments.device_faults(floats | {"context_lengths": context_lengths})
    if faults:
        raise ValueError("contrastive_search_score: " + "; ".join(faults))
    return _op(prob, hidden, context, similarity, context_lengths, alpha, beta)


def _fake(prob, hidden, context, similarity, context_lengths, alpha, beta):
    work = torch.promote_types(torch.promote_types(prob.dtype, hidden.dtype), torch.float32)
    if similarity is not None:
        work = torch.promote_types(work, similarity.dtype)
    return prob.new_empty(prob.shape[:1], dtype=torch.int64), prob.new_empty(prob.shape, dtype=work)


def _flops(prob, hidden, context, similarity, context_lengths, alpha, beta, **_):
    b, k, d = hidden
    return 2 * b * k * context[1] * d if alpha else 0


_op = define(
    "contrastive_search_score(Tensor prob, Tensor hidden, Tensor context, Tensor? similarity,"
    " Tensor? context_lengths, float alpha, float beta) -> (Tensor best, Tensor score)",
    reference=contrastive_search_score_fwd,
    fake=_fake,
    flops=_flops,
    setup_context=no_gradients,
    autocast=(),
)

if TRITON:
    from vlmkernels.triton import contrastive_search_score as _triton

    kernel("contrastive_search_score", "CUDA", _triton.contrastive_search_score, "Triton")
