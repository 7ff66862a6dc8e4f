"""A step's draw across the end of an epoch may hold a prompt twice."""

from __future__ import annotations

from rest_mega.rollout_step import occurrences


def test_occurrences_number_the_repetitions_of_each_id() -> None:
    assert occurrences(["a", "b", "a", "a", "c", "b"]) == [0, 0, 1, 2, 0, 1]
    assert occurrences([]) == []
