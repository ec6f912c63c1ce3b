"""REDI in pure PyTorch. To be imported before torch, which reads the settings below while it is imported."""

import os

# What oneDNN, and ideep between it and torch, prepare for a product of one shape they keep, 1,024 times each. Packed
# batches have a new number of tokens at every step: without a bound the process grows from step to step for long.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "16")
