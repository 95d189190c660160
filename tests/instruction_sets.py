"""`python -m tests.instruction_sets --others`: what this machine runs besides the set that it chooses."""

import subprocess
import sys

import vlmkernels


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
    print(*others())
