"""`python -m tests.instruction_sets --others`: what this machine runs besides the set that it chooses."""

import subprocess
import sys
from pathlib import Path

import vlmkernels
from vlmkernels import _native


def runs(isa: str) -> bool:
    code = f"import vlmkernels; assert vlmkernels.info()['cpu']['instruction set'] == {isa!r}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={"VLMKERNELS_CPU_ISA": isa}, capture_output=True
    )
    return done.returncode == 0


def others() -> list[str]:
    chosen = vlmkernels.info()["cpu"]["instruction set"]
    return [isa for isa in ("baseline", "avx2", "avx512") if chosen and isa != chosen and runs(isa)]


if __name__ == "__main__":
    if list(Path(vlmkernels.__file__).parent.glob("_C*.so")) and _native.extension is None:
        raise SystemExit(f"the C++ extension is there and is not used: {_native.why_not}")
    print(*others())
