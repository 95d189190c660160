"""The order of samples and its division over processes."""

import pytest

from vlmkernels.train.batches import BatchPlan, StreamPlan


def epoch_of(size, batch_size, world_size, epoch=0, **options):
    plans = [
        BatchPlan(size, batch_size, seed=3, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    return list(zip(*(plan.batches(epoch) for plan in plans), strict=True))


@pytest.mark.parametrize(("size", "batch_size"), [(37, 8), (40, 8), (5, 8), (8, 8)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_sample_once_in_the_joint_batches_of_one_process(size, batch_size, world_size):
    joint = epoch_of(size, batch_size, 1)
    parts = epoch_of(size, batch_size, world_size)
    assert len(parts) == len(joint) == -(-size // batch_size) or size % batch_size < world_size
    for step, (whole,) in zip(parts, joint, strict=False):
        assert [index for part in step for index in part] == whole
        assert max(map(len, step)) - min(map(len, step)) <= 1
    seen = sorted(index for (whole,) in joint for index in whole)
    assert seen == list(range(size))


def test_a_rest_smaller_than_the_processes_is_dropped():
    assert [len(part) for part in epoch_of(9, 4, 2)[-1]] == [2, 2]
    assert [len(part) for part in epoch_of(10, 4, 2)[-1]] == [1, 1]


def test_order_depends_on_epoch_and_seed_only():
    plan = BatchPlan(50, 8, seed=1)
    first = list(plan.batches(0))
    assert first == list(BatchPlan(50, 8, seed=1).batches(0))
    assert first != list(plan.batches(1))
    assert first != list(BatchPlan(50, 8, seed=2).batches(0))
    assert list(plan.batches(1, start=3)) == list(plan.batches(1))[3:]


def test_drop_last():
    assert BatchPlan(50, 8, seed=0).steps_per_epoch == 7
    assert BatchPlan(50, 8, seed=0, drop_last=True).steps_per_epoch == 6
    assert len(epoch_of(50, 8, 1, drop_last=True)) == 6


def test_bad_sizes():
    with pytest.raises(ValueError, match="batch_size must be at least the number of processes 4, got 3"):
        BatchPlan(50, 3, seed=0, world_size=4)
    with pytest.raises(ValueError, match="samples in data must be at least 1, one per process, got 0"):
        BatchPlan(0, 8, seed=0)
    with pytest.raises(ValueError, match="samples in data must be at least 8, a batch with drop_last, got 5"):
        BatchPlan(5, 8, seed=0, drop_last=True)
    with pytest.raises(ValueError, match="samples_per_epoch must be at least 2, one per process, got 1"):
        StreamPlan(1, 8, world_size=2)
