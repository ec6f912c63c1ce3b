"""The collapse monitor: does training on wrong traces take the correct ones down with it?

Pushing rejected responses away also lowers the chosen ones, a little where it works, without end where it
collapses (paper, Section 4). The chosen LogPS (log-prob per token) tells the two apart. In the embedded
example, over seeds 10 to 14, α = 0.8 at a rate of 1.5e-4 loses at most 1.05 nats, and the symmetric
objective at 3e-4, which collapses, 5.3 to 8.1. So the rule is: the mean of the last WINDOW steps more than
`threshold` nats below the first step. At the default of 1.5 nats the correct tokens' (geometric mean) probability
is 4.5 times smaller than it was; the collapsing runs get there between step 48 and 68 of 150.
"""

WINDOW = 10  # optimiser steps; single batches of the example differ by 0.2 nats


def new_history() -> dict:
    """What `watch` remembers between steps, ready for JSON: it is saved with a checkpoint."""
    return {"first": None, "recent": [], "warned": False}


def watch(history: dict, metrics: dict, threshold: float) -> str | None:
    """Take in one step's metrics (a line of metrics.jsonl). Returns a warning, once, when the rule above holds.

    Args: threshold in nats per token. Steps whose numbers are not finite (None) are passed over, and so is SFT,
    which pushes nothing away.
    """
    chosen = metrics["chosen_logp"]
    if chosen is None or "rejected_logp" not in metrics:
        return None
    if history["first"] is None:
        history["first"] = {key: metrics[key] for key in ("chosen_logp", "rejected_logp", "grad_norm")}
    history["recent"] = [*history["recent"], chosen][-WINDOW:]
    mean = sum(history["recent"]) / len(history["recent"])
    first = history["first"]
    if history["warned"] or len(history["recent"]) < WINDOW or first["chosen_logp"] - mean <= threshold:
        return None
    history["warned"] = True
    changes = [f"chosen LogPS {first['chosen_logp']:.2f} -> {mean:.2f} (mean of {WINDOW} steps)"]
    for key, name in (("rejected_logp", "rejected LogPS"), ("grad_norm", "gradient norm")):
        if first[key] is not None and metrics[key] is not None:
            changes.append(f"{name} {first[key]:.3g} -> {metrics[key]:.3g}")
    return (f"step {metrics['step']}: collapse? {'; '.join(changes)}. The correct responses are losing probability "
            "as well")
