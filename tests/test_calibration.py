import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import vlmkernels
from vlmkernels import _calibration, _native
from vlmkernels.cli import commands

FLOAT32, BOTH = "oneDNN micro-kernels (float32)", "oneDNN micro-kernels (float32, bfloat16)"
needs_extension = pytest.mark.skipif(
    _native.extension is None, reason="there is one provider without C++ kernels"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and the choice of this process kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VLMKERNELS_CPU_ISA", raising=False)
    monkeypatch.setattr(_calibration, "CHOICE", _calibration.CHOICE)
    monkeypatch.setattr(_calibration, "WHY", _calibration.WHY)
    monkeypatch.setattr(_calibration, "SHAPES", ((64, 48, 32),))
    yield tmp_path
    monkeypatch.undo()
    _calibration.apply(_calibration.CHOICE)


def stored_choice(path, choice, **machine):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": {**_calibration.machine(), **machine}, "choice": choice}))


def mixed():
    choice = _calibration.all_products("own")
    choice["float32"]["input"] = choice["bfloat16"]["weight"] = "torch"
    return choice


@needs_extension
def test_the_command_writes_what_the_next_import_reads(cache):
    done = CliRunner().invoke(commands, ["calibrate"])
    assert done.exit_code == 0, done.output
    path = cache / "vlmkernels" / "calibration.json"
    assert str(path) in done.output
    assert [p.name for p in path.parent.iterdir()] == ["calibration.json"]  # nothing half-written is left
    choice, why = _calibration.load()
    assert choice == json.loads(path.read_text())["choice"]
    assert why == f"measured: {path}"
    for seconds in json.loads(path.read_text())["seconds"].values():
        for product in _calibration.PRODUCTS:
            assert 0 < seconds[product]["own"] < 10
            assert 0 < seconds[product]["torch"] < 10


@needs_extension
def test_a_new_process_uses_the_file_and_says_so(cache):
    stored_choice(_calibration.cache_file(), mixed())
    environment = {k: v for k, v in os.environ.items() if k != "VLMKERNELS_CPU_ISA"}
    code = "import vlmkernels; print(vlmkernels.info()['cpu']['products of linear layers'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "float32 forward: own; float32 input: torch" in done.stdout
    assert f"measured: {_calibration.cache_file()}" in done.stdout


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"choice": {"float32": {}}}', "has no machine"),
    ],
)
def test_a_broken_file_is_ignored_with_the_reason(cache, text, reason):
    path = _calibration.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    choice, why = _calibration.load()
    assert choice == _calibration.by_rule()[0]
    assert reason in why


@pytest.mark.parametrize(
    ("fact", "value"), [("cpu", "Other 9000"), ("torch", "1.0"), ("vlmkernels", "0.0.1")]
)
def test_a_foreign_file_is_ignored_with_the_reason(cache, fact, value):
    stored_choice(_calibration.cache_file(), mixed(), **{fact: value})
    choice, why = _calibration.load()
    assert choice == _calibration.by_rule()[0]
    assert f"was written for another machine or version: {fact} {value!r}, here" in why


def test_a_file_with_other_names_is_ignored(cache):
    stored_choice(_calibration.cache_file(), _calibration.all_products("mkl"))
    assert "has entries other than 'own' and 'torch'" in _calibration.load()[1]


@pytest.mark.parametrize(
    ("cpu", "isa", "tiles", "fast", "float32", "bfloat16", "few"),  # fast: torch's products in bfloat16
    [
        ("AuthenticAMD EPYC", "avx512", BOTH, True, "own", "own", "torch"),
        ("AuthenticAMD EPYC", "avx512", FLOAT32, True, "own", "torch", "torch"),
        ("AuthenticAMD EPYC", "avx2", FLOAT32, False, "torch", "own", "own"),
        ("GenuineIntel Core", "avx2", FLOAT32, True, "torch", "torch", "torch"),
        ("GenuineIntel Xeon", "avx512", BOTH, True, "torch", "torch", "torch"),
        ("AuthenticAMD EPYC", "avx512", "ATen mm", True, "torch", "torch", "torch"),
    ],
)
def test_the_rule_without_a_file(monkeypatch, cpu, isa, tiles, fast, float32, bfloat16, few):
    monkeypatch.delenv("VLMKERNELS_CPU_ISA", raising=False)
    monkeypatch.setattr(_calibration, "torch_multiplies_bf16", lambda: fast)
    facts = {"cpu": cpu, "instruction set": isa, "tile products": tiles}
    monkeypatch.setattr(_calibration, "machine", lambda: facts)
    choice, why = _calibration.by_rule()
    assert set(choice["float32"].values()) == {float32}
    assert choice["bfloat16"].pop("few") == few
    assert set(choice["bfloat16"].values()) == {bfloat16}
    assert why


@needs_extension
def test_the_choice_decides_who_computes(products):
    """oneDNN's and MKL's sums of 4,096 terms differ in their last bits, no matter which is faster."""
    x, weight = torch.randn(300, 4096), torch.randn(200, 4096)
    products("torch")
    assert torch.equal(vlmkernels.linear(x, weight), x @ weight.T)
    products("own")
    own = vlmkernels.linear(x, weight)
    torch.testing.assert_close(own, x @ weight.T, rtol=1e-4, atol=1e-3)
    assert not torch.equal(own, x @ weight.T)
