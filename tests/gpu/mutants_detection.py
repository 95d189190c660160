"""Seeded faults of the kernels of nms and roi_align."""

from .mutants import Mutation

OVERLAPS, SCAN = "nms._overlaps", "nms._scan"
FORWARD, BACKWARD = "roi_align._forward", "roi_align._backward"
RAGGED, GROUPS = "nms, ragged, float32", "nms, groups, bfloat16"
POOLED, FIRST = "roi_align, ragged, float32", "roi_align, of the first version, float16"
BLOCKS = "roi_align, several blocks of bins, float32"

MUTANTS = [
    Mutation(
        OVERLAPS, "nms", "bound of the boxes off by one", RAGGED,
        "_corners(BOXES, cols, cols < n)", "_corners(BOXES, cols, cols <= n)",
    ),
    Mutation(
        OVERLAPS, "nms", "a box overlaps itself", RAGGED,
        "(rows[:, None] < cols[None, :])", "(rows[:, None] <= cols[None, :])",
    ),
    Mutation(
        OVERLAPS, "nms", "common area counted twice in the union", RAGGED,
        "area[:, None] + other[None, :] - common)", "area[:, None] + other[None, :])",
    ),
    Mutation(
        OVERLAPS, "nms", "boxes of later groups suppressed", GROUPS,
        "own[:, None] == tl.load(GROUPS + cols", "own[:, None] <= tl.load(GROUPS + cols",
    ),
    Mutation(
        OVERLAPS, "nms", "word of the boxes themselves left out", RAGGED,
        "if (word + 1) * WORD > first:", "if word * WORD > first:",
    ),
    Mutation(
        SCAN, "nms", "boxes that went suppress others of their word", RAGGED,
        "tl.where(((here >> bit) & 1) == 0, hits, 0)", "hits",
    ),
    Mutation(
        SCAN, "nms", "boxes that went suppress others of later words", RAGGED,
        "stays = (((here >> bit) & 1) == 0) &", "stays =",
    ),
    Mutation(
        SCAN, "nms", "bits of the next box for those of the next word", RAGGED,
        "at += WORD * words", "at += words",
    ),
    Mutation(
        SCAN, "nms", "word of the boxes themselves forgotten", RAGGED,
        "tl.where(cols == word, gone, 0)", "tl.where(cols == word, gone * 0, 0)",
    ),
    Mutation(
        FORWARD, "roi_align", "sum in place of the average", POOLED,
        "(sums / count).to(", "sums.to(",
    ),
    Mutation(
        FORWARD, "roi_align", "samples outside the picture", POOLED,
        "inside = (at >= -1.0) & (at <= length)", "inside = (at >= -3.0) & (at <= length)",
    ),
    Mutation(
        FORWARD, "roi_align", "weights of two columns swapped", POOLED,
        "a * (1.0 - beyond)[None, :] + b * beyond", "a * beyond[None, :] + b * (1.0 - beyond)",
    ),
    Mutation(
        FORWARD, "roi_align", "bins in columns of the picture", BLOCKS,
        "    row_bin, col_bin = (bins // w).to(tl.float32), (bins % w)",
        "    row_bin, col_bin = (bins // h).to(tl.float32), (bins % h)", 2,
    ),
    Mutation(
        FORWARD, "roi_align", "first picture for all", POOLED,
        "((picture * channels + plane.to(tl.int64)) * image_rows", "(plane.to(tl.int64) * image_rows",
    ),
    Mutation(
        FORWARD, "roi_align", "no shift by half a pixel", POOLED,
        "start = low - offset", "start = low",
    ),
    Mutation(
        FORWARD, "roi_align", "narrow boxes of the first version not widened", FIRST,
        "tl.where(extent < 1.0, 1.0, extent)", "tl.where(extent < 1.0, extent, extent)",
    ),
    Mutation(
        FORWARD, "roi_align", "samples on the edges of the bins", FIRST,
        "(number.to(tl.float32) + 0.5) * size", "number.to(tl.float32) * size",
    ),
    Mutation(
        BACKWARD, "roi_align", "boxes of other pictures", POOLED,
"return own & _reaches(top", "return _reaches(top",
    ),
    Mutation(
        BACKWARD, "roi_align", "last boxes left out", BLOCKS,
        "for first in range(0, count, SOME)", "for first in range(0, count - SOME, SOME)",
    ),
    Mutation(
        BACKWARD, "roi_align", "first block of bins alone", BLOCKS,
        "for first_bin in range(0, h * w, BLOCK_B)", "for first_bin in range(0, BLOCK_B, BLOCK_B)",
    ),
    Mutation(
        BACKWARD, "roi_align", "boxes that begin in the square passed over", BLOCKS,
        "(low - 2.0 < first + SIDE)", "(low + 2.0 < first)",
    ),
    Mutation(
        BACKWARD, "roi_align", "number of samples forgotten", FIRST,
        "(share * y)[:, :, None]", "y[:, :, None]",
    ),
    Mutation(
        BACKWARD, "roi_align", "columns stored without their bound", POOLED,
        "((row < image_rows) & (col < image_cols))[None, :]", "(row < image_rows)[None, :]",
    ),
]  # fmt: skip
