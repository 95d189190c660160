"""Seeded faults of the kernels of relative representations and of contrastive search."""

from .mutants import Mutation

POWERS, SPARSE = "relative_representation._forward", "relative_similarity._forward"
SEARCH = "contrastive_search_score._forward"
RAGGED, LONG = "relative_representation, ragged, float32", "relative_representation, long, float16"
FRACTION, FAR = "relative_representation, fraction, float32", "relative_representation, far rows, bfloat16"
TEXTS = "relative_similarity, ragged, float32"
TOKENS, LENGTHS = "contrastive_search_score, ragged, float32", "contrastive_search_score, lengths, float16"
APART = "contrastive_search_score, no token is alike, float32"

MUTANTS = [
    Mutation(
        POWERS, "relative_representation", "similarities below 0 kept", RAGGED,
        "0.5 * x + 0.5 * tl.abs(x)", "x",
    ),
    Mutation(
        POWERS, "relative_representation", "bound of the similarities off by one", RAGGED,
        "counted[:, None] & (cols < k)[None, :], other", "counted[:, None] & (cols <= k)[None, :], other",
    ),
    Mutation(
        POWERS, "relative_representation", "fraction of the power left out", FRACTION,
        "tl.exp2(fraction * tl.log2(", "tl.exp2(0.0 * tl.log2(",
    ),
    Mutation(
        POWERS, "relative_representation", "last bit of the power left out", RAGGED,
        "for bit in range(bits)", "for bit in range(bits - 1)",
    ),
    Mutation(
        POWERS, "relative_representation", "norm of the first block of a row", LONG,
        "squares += tl.sum(r * r, 1)", "squares += 0.0 * tl.sum(r * r, 1)",
    ),
    Mutation(
        POWERS, "relative_representation", "rest of a row stored over its first block", LONG,
        "OUT + (first + cols)[None, :]", "OUT + cols[None, :]",
    ),
    Mutation(
        POWERS, "relative_representation", "rows of neighbouring programs overlap", RAGGED,
        "tl.program_id(0) * BLOCK_R + ", "tl.program_id(0) * (BLOCK_R - 1) + ",
    ),
    Mutation(
        POWERS, "relative_representation", "offset of a row left in int32", FAR,
        "counted, rows = rows < n, rows.to(tl.int64)", "counted = rows < n",
    ),
    Mutation(
        SPARSE, "relative_similarity", "last step of the search left out", TEXTS,
        "for step in range(steps)", "for step in range(steps - 1)",
    ),
    Mutation(
        SPARSE, "relative_similarity", "equal indices passed over", TEXTS,
        "index < wanted, probed", "index <= wanted, probed",
    ),
    Mutation(
        SPARSE, "relative_similarity", "next larger index taken for an equal one", TEXTS,
        "other=-1) == wanted)", "other=-1) >= wanted)",
    ),
    Mutation(
        SPARSE, "relative_similarity", "bound of the search off by one", TEXTS,
        "found = inside & (below < k)", "found = inside & (below <= k)",
    ),
    Mutation(
        SPARSE, "relative_similarity", "store of the texts not masked", TEXTS,
        "tl.store(OUT + image * m + texts, out, mask=counted)", "tl.store(OUT + image * m + texts, out)",
    ),
    Mutation(
        SPARSE, "relative_similarity", "all images read the values of the first", TEXTS,
        "    V += image * k\n", "",
    ),
    Mutation(
        SEARCH, "contrastive_search_score", "tokens past the length compared", LENGTHS,
        "mask=(cols < tokens)[None, :] & inside[:, None], other=0.0)", "mask=inside[:, None], other=0.0)",
    ),
    Mutation(
        SEARCH, "contrastive_search_score", "padding of the tokens taken for a cosine of 0", APART,
        'tl.where((cols < tokens)[None, :], cosines, -float("inf"))', "cosines",
    ),
    Mutation(
        SEARCH, "contrastive_search_score", "norm of the first features of a token", TOKENS,
        "of_c += tl.sum(", "of_c = tl.sum(",
    ),
    Mutation(
        SEARCH, "contrastive_search_score", "last block of tokens alone", TOKENS,
        "most = tl.maximum(most, tl.max(", "most = tl.maximum(-2.0, tl.max(",
    ),
    Mutation(
        SEARCH, "contrastive_search_score", "softmax without the candidates of later blocks", TOKENS,
        "sums += tl.where(rows < k", "sums = tl.where(rows < k",
    ),
    Mutation(
        SEARCH, "contrastive_search_score", "best of the last block", TOKENS,
        "tl.where(here > largest, winner, best)", "tl.where(here > -9.0, winner, best)",
    ),
    Mutation(
        SEARCH, "contrastive_search_score", "bound of the scores off by one", TOKENS,
        "tl.store(SCORE + rows, score, mask=rows < k)", "tl.store(SCORE + rows, score, mask=rows <= k)",
    ),
    Mutation(
        SEARCH, "contrastive_search_score", "sign of the repetition lost", TOKENS,
        "score -= alpha * _repetition", "score += alpha * _repetition",
    ),
]  # fmt: skip
