"""Samples trajectories: engines, the token ledger, turn-by-turn collection with tools."""
