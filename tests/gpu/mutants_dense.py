"""Seeded faults of the kernels between the products of dense layers."""

from .mutants import GATED, GATED_BWD, SCALE_ROWS, Mutation

FORWARD, BACKWARD, COMBINE = "_dense._forward", "_dense._backward", "gated_residual._combine"

GELU, RESIDUAL = "linear, ragged, float32", "linear, no bias, float16"
UP, SILU = "gated_mlp, ragged, float32", "mlp, ragged, float16"
CHANNELS = "gated_residual, channels, masked, bfloat16"

MUTANTS = [
    Mutation(
        FORWARD, "_dense", "bound of the store off by one", GELU,
        "out.to(OUT.dtype.element_ty), mask=at < size)", "out.to(OUT.dtype.element_ty), mask=at <= size)",
    ),
    Mutation(
        FORWARD, "_dense", "elements of neighbouring programs overlap", GELU,
        "to(tl.int64) * BLOCK + tl", "to(tl.int64) * (BLOCK - 1) + tl",
    ),
    Mutation(FORWARD, "_dense", "gate added", UP, "out *= tl.load(UP", "out += tl.load(UP"),
    Mutation(
        FORWARD, "_dense", "residual alone", RESIDUAL, "out += tl.load(RESIDUAL", "out = tl.load(RESIDUAL",
    ),
    Mutation(
        FORWARD, "_dense", "square in place of the cube", UP, "0.044715 * y * y * y", "0.044715 * y * y",
    ),
    Mutation(
        FORWARD, "_dense", "factor of the sigmoid's argument forgotten", RESIDUAL,
        "u, du = 1.702 * y, 1.702", "u, du = y, 1.702",
    ),
    Mutation(
        BACKWARD, "_dense", "programs share their rows", GELU,
        "range(program * BLOCK_R, n, programs * BLOCK_R)", "range(program * BLOCK_R, n, BLOCK_R)",
    ),
    Mutation(BACKWARD, "_dense", "sums of the last rows alone", GELU, "sums += dy", "sums = dy"),
    Mutation(
        BACKWARD, "_dense", "bound of the sums off by one", GELU,
        "tl.sum(sums.to(tl.float64), 0).to(tl.float32), mask=cols < depth)",
        "tl.sum(sums.to(tl.float64), 0).to(tl.float32), mask=cols <= depth)",
    ),
    Mutation(
        BACKWARD, "_dense", "columns of the first block for all", GELU,
        "cols = tl.program_id(0) % col_blocks * BLOCK_D + tl", "cols = tl",
    ),
    Mutation(
        BACKWARD, "_dense", "bound of the columns off by one", GELU,
        "(cols < depth)[None, :]", "(cols <= depth)[None, :]",
    ),
    Mutation(BACKWARD, "_dense", "derivative left out", SILU, "dy = dout * slope", "dy = dout"),
    Mutation(
        BACKWARD, "_dense", "derivative of the density's argument", GELU,
        "tl.exp(-0.5 * y * y)", "tl.exp(-y * y)",
    ),
    Mutation(
        BACKWARD, "_dense", "inner derivative forgotten", UP,
        "s + y * s * (1.0 - s) * du", "s + y * s * (1.0 - s)",
    ),
    Mutation(BACKWARD, "_dense", "gradient of the gate without up", UP, "dout *= up", "dout *= 1.0"),
    Mutation(
        BACKWARD, "_dense", "gradient of up by the gate itself", UP,
        "tl.store(DUP + at, (dout * act)", "tl.store(DUP + at, (dout * slope)",
    ),
    Mutation(BACKWARD, "_dense", "hidden layer without up", UP, "act *= up", "act *= 1.0"),
    Mutation(
        COMBINE, "gated_residual", "last parts left out", GELU,
        "range(0, parts, BLOCK_R)", "range(0, parts - BLOCK_R, BLOCK_R)",
    ),
    Mutation(
        COMBINE, "gated_residual", "last parts alone", GELU,
        "total += tl.load(PARTIAL", "total = tl.load(PARTIAL",
    ),
    Mutation(
        COMBINE, "gated_residual", "bound of the store off by one", CHANNELS,
        "(OUT.dtype.element_ty), mask=cols < width)", "(OUT.dtype.element_ty), mask=cols <= width)",
    ),
    Mutation(
        COMBINE, "gated_residual", "columns of the first block for all", CHANNELS,
        "cols = tl.program_id(0) * BLOCK_D + tl", "cols = tl",
    ),
    Mutation(
        COMBINE, "gated_residual", "derivative of the gate's tanh left out", CHANNELS,
        "out *= 4.0 * e / ((1.0 + e) * (1.0 + e))", "out *= 1.0",
    ),
    Mutation(
        SCALE_ROWS, "gated_linear_residual", "weight without the gate",
        "gated_linear_residual, channels, bfloat16",
        "(t * y).to(SCALED.dtype.element_ty)", "y.to(SCALED.dtype.element_ty)",
    ),
    Mutation(
        GATED_BWD, "gated_residual", "tanh of small gates by the exponential",
        "gated_residual, small gates, float32",
        "tl.where(tl.abs(x) < 0.625,", "tl.where(tl.abs(x) < 0.0,",
    ),
    Mutation(
        GATED, "gated_residual", "tanh of large gates by the quotient",
        "gated_residual, large gates, float32",
        "tl.where(tl.abs(x) < 0.625,", "tl.where(tl.abs(x) < 100.0,",
    ),
]  # fmt: skip
