"""The cases under the sanitizer, and the proof that they reach every kernel, every tile and every branch."""

import collections
import importlib
import inspect
import pkgutil
import re

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

import vlmkernels.triton
from vlmkernels.reference._dense import ACTIVATIONS
from vlmkernels.reference.distillation import DIVERGENCES
from vlmkernels.triton import (
    _attention,
    _attention_bwd,
    _dense,
    embedding_distillation,
    gated_residual,
    relative_representation,
    sigmoid_loss,
    srau,
)
from vlmkernels.triton import _contrastive_distillation_bwd as distilled_bwd
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton import contrastive_distillation as distilled

from .cases import CASES, SIMULATED
from .trials import DTYPES

HALF = {torch.bfloat16, torch.float16}
MODULES = [
    importlib.import_module(f"vlmkernels.triton.{found.name}")
    for found in pkgutil.iter_modules(vlmkernels.triton.__path__)
]
TABLES = {
    "contrastive_distillation._stats": distilled.STATS,
    "_contrastive_distillation_bwd._tile_grads": distilled_bwd.GRADS,
    "_stats": tiles.STATISTICS,
    "_tile_grads": tiles.TILES,
    "_sweep": sigmoid_loss.SWEEP,
    "gated_linear_residual._forward": tiles.TILES,
    "_retrieval._rank": tiles.STATISTICS,
    "_retrieval._best_matches": tiles.STATISTICS,
    "retrieval_ranks._count": tiles.STATISTICS,
    "_attention._forward": _attention.FORWARD,
    "_query_grads": _attention_bwd.QUERY_GRADS,
    "_key_grads": _attention_bwd.KEY_GRADS,
}
EXCEPTIONS = {  # of the architecture of the cases
    "_query_grads": _attention_bwd.QUERY_GRADS_ON["sm_80"],
    "_key_grads": _attention_bwd.KEY_GRADS_ON.get("sm_80", {}),
}
# They read no features, so know one dtype
SUMS = {
    "_info_nce_bwd._coefficients",
    "info_nce._join",
    "info_nce._losses",
    "info_nce._total",
    "contrastive_distillation._join",
    "interval_attention._bias_sums",
    "contrastive_distillation._losses",
    "_attention_bwd._query_ranges",
    "_rows._total",
    "gated_residual._combine",
    "nms._scan",
}
ALONE = {"_rows._total", "info_nce._total", "_info_nce_bwd._coefficients", "nms._scan"}  # one program


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case.slow or name in SIMULATED))
        for name, case in CASES.items()
    ],
    ids=list(CASES),
)
def test_as_good_as_the_reference(case):
    case.run()


def kernels() -> dict[str, JITFunction]:
    """Those that are launched, by `module.name`."""
    sources = "".join(inspect.getsource(module) for module in MODULES)
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}": kernel
        for module in MODULES
        for name, kernel in vars(module).items()
        if isinstance(kernel, JITFunction) and kernel.__module__ == module.__name__
        and re.search(rf"\b{name}\[.+\]\(", sources)
    }  # fmt: skip


@pytest.fixture(scope="module")
def launches():
    """The launches of all cases by kernel, and of the default ones."""
    found = {True: collections.defaultdict(list), False: collections.defaultdict(list)}
    for case in CASES.values():
        for launch in case.launched():
            found[True][launch.name].append(launch)
            if not case.slow:
                found[False][launch.name].append(launch)
    return found[True], found[False]


def features(launch) -> torch.dtype:
    tensors = ((name, x) for name, x in launch.tensors.items() if x.is_floating_point())
    products = ("P", "Z")  # always float32
    return next(x.dtype for name, x in tensors if name not in products)


def table_of(name):
    return next((table for suffix, table in TABLES.items() if name.endswith(suffix)), None)


def test_every_kernel_is_launched_by_a_default_case_and_in_every_dtype(launches):
    every, default = launches
    assert set(default) == set(every) == set(kernels())
    for name in set(every) - SUMS:
        assert {features(launch) for launch in every[name]} >= set(DTYPES), name


def test_every_table_of_tiles_belongs_to_a_kernel():
    tables = {
        id(value)
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, dict) and value and type(next(iter(value.values()))).__name__ == "Tile"
    }
    assert tables == {id(table) for table in TABLES.values()}


def entry_of(launch, biased: bool):
    """The key of its table under which a launch finds its tile, if it uses all of it."""
    config, half, table = launch.config, features(launch) in HALF, table_of(launch.name)
    if "BLOCK_K" in config:
        kind = "half" if half else config["PRECISION"]
        keys = [(kind, True), (kind, False)]
        tile = [config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")]
        return {key for key in keys if list(table[key]) == tile}
    key = (half, max(config["BLOCK_D"], config["BLOCK_V"], 64))
    exceptions = next((x for suffix, x in EXCEPTIONS.items() if launch.name.endswith(suffix)), {})
    block_m, block_n, warps, stages = exceptions.get((*key, biased), table[key])
    if (launch.arguments["TABLE"] is not None) != biased:
        return set()
    if biased:  # the table of biases costs shared memory
        whole = config["BLOCK_N"] == block_n and config["BLOCK_M"] in (block_m, block_m // 2)
        return {key} if whole and config["num_warps"] == warps else set()
    tile = [config[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")]
    return {key} if tile == [block_m, block_n, warps, stages] else set()


def test_every_tile_is_used_whole_by_each_of_its_kernels(launches):
    for name in kernels():
        table = table_of(name)
        if table is None:
            continue
        for biased in (False, True) if "_attention" in name else (False,):
            used = {key for launch in launches[0][name] for key in entry_of(launch, biased)}
            assert used == set(table), f"{name}, {'biased' if biased else 'plain'}"
            both = {
                (key, features(launch)) for launch in launches[0][name] for key in entry_of(launch, biased)
            }
            for key in table:
                if key[0] in (True, "half"):
                    assert {dtype for at, dtype in both if at == key} == HALF, (name, key)


def test_every_tile_of_the_row_kernels_is_used(launches):
    widths = {gated_residual.blocks(depth)["BLOCK_D"] for depth in range(1, 3 * gated_residual.TILE)}
    for name in ("gated_residual._forward", "gated_residual._backward"):
        assert {launch.config["BLOCK_D"] for launch in launches[0][name]} == widths
    widths = {srau.blocks(depth)["BLOCK_D"] for depth in range(1, 3 * srau.TILE)}
    for name in ("srau._forward", "srau._backward"):
        assert {launch.config["BLOCK_D"] for launch in launches[0][name]} == widths
    widths = {gated_residual.blocks(depth)["BLOCK_D"] for depth in range(1, _dense.WIDTH + 1)}
    assert {launch.config["BLOCK_D"] for launch in launches[0]["_dense._backward"]} == widths
    for name in ("_dense._forward", "_dense._backward"):
        for gated in (True, False):
            made = [x for x in launches[0][name] if (x.arguments["UP"] is not None) == gated]
            own = ACTIVATIONS if gated else ACTIVATIONS[1:]
            assert {x.config["ACTIVATION"] for x in made} == set(own), f"{name}, {gated}"
    tiles_of_rows = {
        tuple(embedding_distillation.blocks(depth)[side] for side in ("BLOCK_R", "BLOCK_D"))
        for depth in range(1, 2 * embedding_distillation.HELD)
    }
    for name in ("embedding_distillation._forward", "embedding_distillation._backward"):
        made = launches[0][name]
        assert {(x.config["BLOCK_R"], x.config["BLOCK_D"]) for x in made} >= tiles_of_rows, name
        assert {x.config["LONG"] for x in made} == {True, False}, name
    tiles_of_rows = {
        tuple(relative_representation.blocks(k)[side] for side in ("BLOCK_R", "BLOCK_K"))
        for k in range(1, 2 * relative_representation.HELD)
    }
    made = launches[0]["relative_representation._forward"]
    assert {(x.config["BLOCK_R"], x.config["BLOCK_K"]) for x in made} >= tiles_of_rows
    forms = {(x.config["DIVERGENCE"], x.config["LONG"]) for x in launches[0]["distillation._forward"]}
    divergences = (*DIVERGENCES, "none")
    assert forms == {(name, long) for name in divergences for long in (True, False)}
    for name in ("interval_attention._bias_grads",):
        assert {launch.config["BLOCK"] for launch in launches[0][name]} == {16, 32}
    finish = ("_info_nce_bwd._finish", "sigmoid_loss._finish")
    for name in ("_pairwise._norms", *finish, "gated_linear_residual._scale_rows"):
        looped = [
            launch for launch in launches[0][name] if launch.arguments["depth"] > launch.config["BLOCK"]
        ]
        assert looped, f"{name}: no row is wider than a block"
    for name, size in (
        ("_pairwise_classes._move_rows", "depth"),
        ("linear_cross_entropy._row_losses", "classes"),
        ("linear_distillation._offline", "classes"),
        ("linear_distillation._offline", "k"),
    ):
        made, block = launches[0][name], "BLOCK_K" if size == "k" else "BLOCK"
        looped = {launch.arguments[size] > launch.config[block] for launch in made}
        assert looped == {True, False}, (name, size)


def test_float32_products_of_attention_run_in_both_precisions(launches):
    for name in ("_attention._forward", "_attention_bwd._query_grads", "_attention_bwd._key_grads"):
        found = {
            (launch.config["PRECISION"], max(launch.config["BLOCK_D"], 64))
            for launch in launches[0][name]
            if features(launch) == torch.float32
        }
        assert found == {(p, width) for p in ("tf32", "tf32x3") for width in (64, 128)}


def test_every_launch_says_whether_a_product_and_a_sum_are_fused(launches):
    """The default is Triton's, and its release 3.9 announces another."""
    for name, made in launches[0].items():
        assert all("enable_fp_fusion" in launch.kwargs for launch in made), name


def test_every_optional_argument_is_given_and_is_absent(launches):
    for name, kernel in kernels().items():
        optional = set(re.findall(r"^\s+(\w+),  # .*\bor None\b", kernel.src, re.MULTILINE))
        switches = {
            p.name
            for p in kernel.params
            if re.match(
                "EVEN_|STEP|EACH|PAIRS|PER_|PUT|SMOOTHED|KL|MEAN|LONG|OWN|HARD|JSD|TAIL|NORMALIZE", p.name
            )
        }
        for argument in optional:
            given = {launch.arguments[argument] is not None for launch in launches[0][name]}
            assert given == {True, False}, f"{name}: {argument}"
        for switch in switches:
            off = 1 if switch == "STEP" else False
            found = {launch.config[switch] != off for launch in launches[0][name]}
            assert found == {True, False}, f"{name}: {switch}"


def test_default_cases_have_ragged_edges_and_several_programs(launches):
    for name in set(kernels()) - ALONE:
        assert max(launch.grid[0] for launch in launches[1][name]) > 1, name
