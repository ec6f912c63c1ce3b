"""Reinforcement Distillation (REDI, arXiv 2505.24850) in pure PyTorch."""
