"""The paired test against all signs, written out, and against its own definition on noise."""

import itertools
import random
import statistics

import pytest

from benchmarks.paired import compare


def test_p_is_that_of_all_signs():
    first, second = [0.3, 0.1, 0.9, 0.4, 0.5, 0.2, 0.7], [0.1, 0.2, 0.3, 0.4, 0.1, 0.1, 0.2]
    differences = [a - b for a, b in zip(first, second, strict=True)]
    means = [
        statistics.fmean(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((-1, 1), repeat=7)
    ]
    mean = statistics.fmean(differences)
    exact = statistics.fmean(abs(each) >= abs(mean) - 1e-12 for each in means)
    found = compare(first, second)
    assert found.mean == pytest.approx(mean)
    assert found.p == pytest.approx(exact, abs=0.005)
    assert compare(second, first).p == pytest.approx(exact, abs=0.005)
    assert found.low < mean < found.high
    assert found == compare(first, second)
    assert str(found).startswith("+0.243 [+0.")


def test_noise_is_no_difference_and_a_shift_is_one():
    rng = random.Random(0)
    small = []
    for seed in range(200):
        noise = [rng.gauss(0, 1) for _ in range(20)]
        small.append(compare(noise, [0.0] * 20, draws=400, seed=seed).p <= 0.1)
    assert 0.04 < statistics.fmean(small) < 0.17
    noise = [rng.gauss(0, 1) for _ in range(36)]
    found = compare([x + 2 for x in noise], [0.0] * 36, draws=2000)
    assert found.p == 1 / 2001
    assert found.low > 1
    assert compare([1.0] * 3, [1.0] * 3, draws=50).p == 1


def test_sequences_must_pair_up():
    with pytest.raises(ValueError, match="must pair up, got 1 and 2"):
        compare([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="must pair up, got 0 and 0"):
        compare([], [])
