"""Seeded faults of the retrieval kernels."""

from .mutants import Mutation

RANK, BEST, COUNT = "_retrieval._rank", "_retrieval._best_matches", "retrieval_ranks._count"
TOP, BOTH = "topk_similarity, ragged, float32", "topk_similarity, options, bfloat16"
NAN, FAR = "topk_similarity, NaN, float32", "topk_similarity, far rows, bfloat16"
MINED, GROUPED = "mine_hard_negatives, ragged, float32", "mine_hard_negatives, options, bfloat16"
RANKS, BY_ID = "retrieval_ranks, ragged, float32", "retrieval_ranks, options, bfloat16"
RANKS_NAN, RANKS_FAR = "retrieval_ranks, NaN, float32", "retrieval_ranks, far rows, bfloat16"
NAN_BY_ID = "retrieval_ranks, NaN by id, float32"
ALL = "topk_similarity, more than there are, float32"


# fmt: off
MUTANTS = [
    Mutation(
        RANK, "_retrieval", "of equal scores the higher index is better", TOP,
        "(4294967295 - indices.to(tl.int64))", "indices.to(tl.int64)",
    ),
    Mutation(
        RANK, "_retrieval", "negative scores in the order of their magnitudes", ALL,
        "order = bits ^ ((bits >> 31) & 0x7FFFFFFF)", "order = bits",
    ),
    Mutation(
        RANK, "_retrieval", "NaN above all", NAN,
        "    order = tl.where(scores != scores, -2147483648, order)\n", "",
    ),
    Mutation(
        RANK, "_retrieval", "matches are candidates", MINED,
        "ranked = tl.where(out, -9223372036854775808, ranked)", "ranked = tl.where(out, ranked, ranked)",
    ),
    Mutation(
        RANK, "_retrieval", "groups ignored", GROUPED, "if QUERY_GROUPS is not None:", "if False:",
    ),
    Mutation(
        RANK, "_retrieval", "margin added", MINED,
        "tl.float32, bitcast=True) - margin", "tl.float32, bitcast=True) + margin",
    ),
    Mutation(
        RANK, "_retrieval", "store not masked", TOP,
        "tl.store(OUT + at, ranked, mask=inside)", "tl.store(OUT + at, ranked, mask=row_inside[:, None])",
    ),
    Mutation(
        RANK, "_retrieval", "indices of the keys for those of the queries", BOTH,
        "_ranked(scores, (row0 + rows)[:, None])", "_ranked(scores, (col0 + cols)[None, :])",
    ),
    Mutation(
        BEST, "_retrieval", "best of all", RANKS,
        "order = tl.where(same, order_of(scores), -2147483648)", "order = order_of(scores)",
    ),
    Mutation(
        BEST, "_retrieval", "pairs past the end match", BY_ID,
        "    same &= row_inside[:, None] & col_inside[None, :]\n", "",
    ),
    Mutation(
        BEST, "_retrieval", "results of neighbouring tiles overlap", BY_ID,
        "tl.store(ROWS + col_tile.to(tl.int64) * n + rows, tl.max", "tl.store(ROWS + rows, tl.max",
    ),
    Mutation(
        BEST, "_retrieval", "NaN no better than a number", NAN_BY_ID,
        "tl.where(scores != scores, 0x7FFFFFFF, order)", "tl.where(scores != scores, -2147483647, order)",
    ),
    Mutation(
        COUNT, "retrieval_ranks", "equal scores are below", RANKS,
        "~(scores < own[:, None])", "(scores > own[:, None])",
    ),
    Mutation(
        COUNT, "retrieval_ranks", "NaN is below", RANKS_NAN,
        "~(scores < other[None, :])", "(scores >= other[None, :])",
    ),
    Mutation(
        COUNT, "retrieval_ranks", "matches counted", BY_ID, " & ~same\n", "\n",
    ),
    Mutation(
        COUNT, "retrieval_ranks", "results of neighbouring tiles overlap", RANKS,
        "tl.store(COLS + row_tile.to(tl.int64) * m + cols", "tl.store(COLS + cols",
    ),
]
