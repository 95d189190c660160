"""`python -m tests.fuzz raw|public`: many random calls; `--count 1 --seed N` shows and repeats one."""

import argparse
import collections
import itertools
import sys
import time
from collections.abc import Iterator

import torch

from . import children, public, raw


def batches(seed: int, count: int | None, minutes: float) -> Iterator[range]:
    stop = time.monotonic() + 60 * minutes
    for first in itertools.count(seed, children.BATCH):
        done = first - seed
        if time.monotonic() > stop if count is None else done >= count:
            return
        yield range(first, first + min(children.BATCH, count - done if count is not None else children.BATCH))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("raw", "public"))
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first call; each call has a seed of its own"
    )
    parser.add_argument("--count", type=int, help="so many calls")
    parser.add_argument("--minutes", type=float, default=1.0, help="calls for so long, without --count")
    options = parser.parse_args()
    raw.ops.gated_residual(*[torch.empty(1, device="meta")] * 3, None)  # imports what children would each
    kind = {"raw": raw, "public": public}[options.kind]
    if options.count == 1:
        print(kind.told(options.seed))
    report = children.run(kind.call, batches(options.seed, options.count, options.minutes))
    kinds = collections.Counter(fault.what.splitlines()[0] for fault in report.faults)
    for fault in report.faults[:50]:
        again = (
            f"python -m tests.fuzz {options.kind} --seed {fault.first} --count {fault.last - fault.first + 1}"
        )
        print(f"{again}\n    {fault.what}")
    ended = f"{report.results} results, {report.refusals} refusals, {len(report.faults)} faults"
    print(f"{report.calls} calls: {ended}")
    for what, count in kinds.most_common(20):
        print(f"    {count} x {what}")
    return bool(report.faults)


if __name__ == "__main__":
    sys.exit(main())
