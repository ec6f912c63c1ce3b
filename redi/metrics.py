"""pass@1 with its two standard errors, and pass@k."""

import math

import numpy as np


def pass_at_1(correct: np.ndarray) -> tuple[float, float | None, float | None]:
    """Mean of correct (n problems, k samples) bool, its standard error over runs, and its standard error over problems.

    Over runs, as in the paper (Appendix C.5): each of the k columns is one run over the benchmark with its own
    accuracy. It tells how much other samples of the same problems would differ. None for k = 1.
    Over problems: each of the n rows is one problem with its own accuracy. It tells how much the same number of
    other problems of this kind, and samples of them, would differ. None for n = 1.
    """
    runs, problems = correct.mean(axis=0), correct.mean(axis=1)
    return float(runs.mean()), _standard_error(runs), _standard_error(problems)


def _standard_error(values: np.ndarray) -> float | None:
    """Of the mean of n independent values: their sample standard deviation (ddof 1) / √n; None for one value."""
    n = len(values)
    return float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Probability that k of a problem's n samples, drawn without replacement, hold a correct one: the mean.

    1 - C(n - c, k) / C(n, k) for c correct of n (Chen et al. 2021, Eq. 1). correct: (problems, n), k <= n.
    """
    n = correct.shape[1]
    assert 1 <= k <= n
    return float(np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in correct.sum(axis=1).tolist()]))
