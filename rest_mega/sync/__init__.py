"""Weights in and out: Hugging Face files, this rank's shards, the rollout engine."""
