"""Losses: pure functions of tensors and a process group."""
