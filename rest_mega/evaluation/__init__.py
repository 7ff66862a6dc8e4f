"""Held-out success and benchmarks, during training or alone."""
