import itertools

import numpy as np
import pytest

from redi.evaluation.scoring import pass_at_1, pass_at_k


def test_pass_at_1_and_its_errors_by_hand():
    # Columns (runs over the benchmark) are right in 2, 1 and 1 of 2: accuracies 1, 0.5, 0.5.
    # Rows (problems) are right in 2 and 2 of 3.
    correct = np.array([[True, True, False], [True, False, True]])
    mean, sem, sem_problems = pass_at_1(correct)
    assert mean == pytest.approx(2 / 3)
    # squared deviations 1/9, 1/36, 1/36: sum 1/6, sample variance 1/12, SEM sqrt(1/12) / sqrt(3) = 1/6
    assert sem == pytest.approx(1 / 6)
    assert sem_problems == pytest.approx(0)
    assert pass_at_1(correct[:, :1]) == (1.0, None, 0.0)


def test_the_error_over_problems_by_hand():
    # Problems solved in 2, 1, 0 and 0 of 2 samples: accuracies 1, 1/2, 0, 0, mean 3/8. Squared deviations
    # 25/64, 1/64, 9/64, 9/64: sum 44/64, sample variance 44/192, over 4 problems: 11/192.
    correct = np.array([[True, True], [True, False], [False, False], [False, False]])
    mean, sem, sem_problems = pass_at_1(correct)
    assert (mean, sem_problems) == (3 / 8, pytest.approx((11 / 192) ** 0.5))
    # Columns 1/2 and 1/4: squared deviations 1/64 each, sample variance 1/32, over 2 runs: 1/64.
    assert sem == pytest.approx(1 / 8)
    # One greedy sample of 100 problems, 10 right: sqrt(0.1 * 0.9 / 99), the error of a share of 100.
    greedy = np.arange(100)[:, None] < 10
    assert pass_at_1(greedy) == (0.1, None, pytest.approx((0.09 / 99) ** 0.5))
    assert pass_at_1(correct[1:2]) == (0.5, pytest.approx(0.5), None)


def test_pass_at_k_equals_trying_all_subsets():
    correct = np.random.default_rng(0).random((7, 6)) < [[0.1], [0.3], [0.5], [0.9], [0.0], [1.0], [0.2]]
    for k in range(1, 7):
        subsets = list(itertools.combinations(range(6), k))
        naive = np.mean([[row[list(subset)].any() for subset in subsets] for row in correct])
        assert pass_at_k(correct, k) == pytest.approx(naive)
    assert pass_at_k(correct, 1) == pytest.approx(pass_at_1(correct)[0])
    assert pass_at_k(correct, 6) == correct.any(axis=1).mean()


def test_pass_at_k_at_sizes_where_factorials_are_large():
    correct = np.zeros((1, 1000), dtype=bool)
    correct[0, 0] = True
    assert pass_at_k(correct, 250) == pytest.approx(0.25)
