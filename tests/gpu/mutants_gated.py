"""Seeded faults of the kernels of srau."""

from .mutants import Mutation

FORWARD, BACKWARD = "srau._forward", "srau._backward"
RAGGED, MASKED, WIDE = (
    "srau, ragged, float32",
    "srau, paper, masked, bfloat16",
    "srau, one level, wide, float32",
)

MUTANTS = [
    Mutation(
        FORWARD, "srau", "bound of the rows off by one", RAGGED,
        "inside = (rows < n)[:, None]", "inside = (rows <= n)[:, None]",
    ),
    Mutation(
        FORWARD, "srau", "row mask ignored", MASKED,
        "heard = tl.load(LANGUAGE + at, mask=kept, other=0.0).to(tl.float32)\n    total",
        "heard = tl.load(LANGUAGE + at, mask=inside, other=0.0).to(tl.float32)\n    total",
    ),
    Mutation(
        FORWARD, "srau", "columns of the first block for all", WIDE,
        "cols = tl.program_id(0) % col_blocks * BLOCK_D + tl.arange(0, BLOCK_D)",
        "cols = tl.arange(0, BLOCK_D)",
    ),
    Mutation(
        FORWARD, "srau", "rows of neighbouring programs overlap", RAGGED,
        "tl.program_id(0) // col_blocks * BLOCK_R", "tl.program_id(0) // col_blocks * (BLOCK_R - 1)",
    ),
    Mutation(
        FORWARD, "srau", "first level read for all", RAGGED,
        "total += a * heard + b * seen\n        at_level += level", "total += a * heard + b * seen",
    ),
    Mutation(
        FORWARD, "srau", "orientation ignored", MASKED,
        "z = logits.to(tl.float32) * SIGN", "z = logits.to(tl.float32)",
    ),
    Mutation(
        FORWARD, "srau", "image cut at the threshold of the text", RAGGED,
        "tl.where(alpha >= rest_of_tau, 0.0, rest)", "tl.where(alpha >= tau, 0.0, rest)",
    ),
    Mutation(
        BACKWARD, "srau", "sum of the last level alone", RAGGED,
        "total += a\n", "total = a\n",
    ),
    Mutation(
        BACKWARD, "srau", "gradient of the logits through sides that are cut", RAGGED,
        "rest * a * heard - alpha * b * seen", "rest * alpha * heard - alpha * rest * seen",
    ),
    Mutation(
        BACKWARD, "srau", "sign of the logits' gradient", MASKED,
        "slope = SIGN * g *", "slope = g *",
    ),
    Mutation(
        BACKWARD, "srau", "masked rows of the image's gradient left out", MASKED,
        "(g * b).to(DVISUAL.dtype.element_ty), mask=inside",
        "(g * b).to(DVISUAL.dtype.element_ty), mask=kept",
    ),
    Mutation(
        BACKWARD, "srau", "scale forgotten", RAGGED,
        "g = scale * tl.load", "g = tl.load",
    ),
]  # fmt: skip
