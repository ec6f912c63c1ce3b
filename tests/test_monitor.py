"""The collapse monitor on made-up curves; a slow test in test_toy.py holds it to real runs."""

import json

from redi.training.run import WINDOW, new_history, watch


def first_warning(curve, threshold=1.0):
    history = new_history()
    for step, chosen in enumerate(curve, 1):
        row = {"step": step, "chosen_logp": chosen, "rejected_logp": -2.0, "grad_norm": 1.0}
        history = json.loads(json.dumps(history))  # as a checkpoint keeps it
        if warning := watch(history, row, threshold):
            assert f"step {step}:" in warning and "chosen LogPS" in warning
            return step
    return None


def test_a_steady_fall_is_reported_when_the_mean_has_lost_the_threshold():
    curve = [-0.1 - 0.05 * step for step in range(100)]
    step = first_warning(curve)
    mean = sum(curve[step - WINDOW : step]) / WINDOW
    before = sum(curve[step - WINDOW - 1 : step - 1]) / WINDOW
    assert curve[0] - mean > 1.0 >= curve[0] - before
    assert first_warning(curve, threshold=2.0) > step


def test_a_plateau_below_the_start_and_single_outliers_are_not():
    assert first_warning([-0.1] + [-0.9] * 200) is None
    assert first_warning([-0.1] * 50 + [-5.0] + [-0.1] * 50) is None


def test_steps_without_numbers_are_passed_over():
    assert first_warning([None, -0.1, None] + [-3.0] * WINDOW) == WINDOW + 2


def test_the_warning_comes_once():
    history, warnings = new_history(), []
    for step in range(40):
        metrics = {"step": step, "chosen_logp": -0.1 * step, "rejected_logp": -2.0, "grad_norm": None}
        warnings.append(watch(history, metrics, 1.0))
    assert len([w for w in warnings if w]) == 1


def test_sft_is_not_watched():
    history = new_history()
    assert not any(watch(history, {"step": step, "chosen_logp": -float(step)}, 1.0) for step in range(40))
