"""Sampling with a KV cache, the sample store, and scores."""
