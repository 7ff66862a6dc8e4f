"""Trains the policy on Megatron-Core: model, schedules, optimizer, checkpoints."""
