"""Groups of trajectories and their rewards -> samples for the trainer."""

from __future__ import annotations

import numpy as np
import pytest

from rest_mega.config import CreditConfig
from rest_mega.credit.advantages import advantages
from rest_mega.credit.assign import assign, penalised
from rest_mega.credit.regions import tag_trajectory
from rest_mega.records import Prompt, Trajectory, Turn

WORDS = [b"<prompt>", b"<think>", b"hm", b"</think>", b"Yes", b".", b"<tool_call>", b"<end>"]
END = len(WORDS) - 1
REWARDS_PG = np.array([[1.0, 0.0, 0.5], [2.0, 2.0, 2.0], [0.0, 0.0, 3.0]])


def trajectory(group: int, sibling: int) -> Trajectory:
    """A prompt and one turn, in which group and sibling choose the words."""
    ids_T = np.array([0, 1, 2 + group % 2, 3, 4, 5 + sibling % 2, END], np.int32)
    count = len(ids_T)
    mask_T = np.arange(count) > 0
    return Trajectory(
        prompt=Prompt(f"p{group}", ()),
        sibling=sibling,
        ids_T=ids_T,
        logprobs_T=(-0.1 * (group + 1) * (sibling + 1) * mask_T).astype(np.float32),
        mask_T=mask_T,
        turn_T=np.where(mask_T, 0, -1).astype(np.int32),
        version_T=np.where(mask_T, 0, -1).astype(np.int32),
        turns=(Turn(1, count, "", True),),
        stop="answered",
    )


GROUPS = [[trajectory(p, g) for g in range(3)] for p in range(3)]


def token_bytes(token_id: int) -> bytes:
    return WORDS[token_id]


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("drop", [True, False])
def test_samples_are_the_trajectories_with_regions_and_advantages(method: str, drop: bool) -> None:
    config = CreditConfig(advantage=method, drop_equal_groups=drop)
    kept, without = assign(GROUPS, REWARDS_PG, config, "hermes", token_bytes)
    assert without == 1
    places = [0, 2] if drop else [0, 1, 2]
    assert len(kept) == len(places)
    advantages_PG = advantages(REWARDS_PG, method)
    for place, samples in zip(places, kept, strict=True):
        assert [sample.advantage for sample in samples] == advantages_PG[place].tolist()
        for one, sample in zip(GROUPS[place], samples, strict=True):
            assert np.array_equal(sample.ids_T, one.ids_T)
            assert np.array_equal(sample.mask_T, one.mask_T)
            assert np.array_equal(sample.logprobs_T, one.logprobs_T)
            expected_T = tag_trajectory(one, "hermes", token_bytes)
            assert np.array_equal(sample.regions_T, expected_T)


def test_kept_groups_without_signal_have_no_advantage() -> None:
    config = CreditConfig(drop_equal_groups=False)
    kept, _ = assign(GROUPS, REWARDS_PG, config, "hermes", token_bytes)
    assert [sample.advantage for sample in kept[1]] == [0, 0, 0]


def test_a_permuted_group_has_permuted_samples() -> None:
    order, config = [2, 0, 1], CreditConfig()
    (plain,), _ = assign(GROUPS[:1], REWARDS_PG[:1], config, "hermes", token_bytes)
    shuffled = [GROUPS[0][n] for n in order]
    (again,), _ = assign([shuffled], REWARDS_PG[:1, order], config, "hermes", token_bytes)
    for n, sample in zip(order, again, strict=True):
        assert sample.advantage == pytest.approx(plain[n].advantage, rel=1e-6)
        assert np.array_equal(sample.ids_T, plain[n].ids_T)
        assert np.array_equal(sample.regions_T, plain[n].regions_T)


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo"])
def test_penalised_advantages_are_those_of_the_reduced_rewards_in_any_order(method: str) -> None:
    config = CreditConfig(advantage=method)
    kept, _ = assign(GROUPS, REWARDS_PG, config, "hermes", token_bytes)
    samples = [sample for group in kept for sample in group]
    plain = penalised(samples, np.zeros(6), config)
    assert plain.tolist() == [sample.advantage for sample in samples]
    penalty_S = np.array([0.3, 0.1, 0.0, 2.0, 0.5, 0.25])
    want = advantages(REWARDS_PG[[0, 2]] - penalty_S.reshape(2, 3), method).ravel()
    order = [4, 0, 3, 1, 5, 2]
    got = penalised([samples[i] for i in order], penalty_S[order], config)
    assert got == pytest.approx(want[order], rel=1e-6)


def test_a_kept_group_of_equal_rewards_is_told_apart_by_its_penalties_alone() -> None:
    config = CreditConfig(drop_equal_groups=False, advantage="dr_grpo")
    kept, _ = assign(GROUPS, REWARDS_PG, config, "hermes", token_bytes)
    got = penalised(kept[1], np.array([0.0, 0.3, 0.6]), config)
    assert got == pytest.approx([0.3, 0.0, -0.3])


def test_no_samples_have_no_penalised_advantages() -> None:
    assert penalised([], np.zeros(0), CreditConfig()).tolist() == []


def test_groups_of_one_are_kept_by_their_reward() -> None:
    groups = [[GROUPS[0][0]], [GROUPS[0][1]]]
    kept, without = assign(groups, np.array([[-0.5], [0.0]]), CreditConfig(), "hermes", token_bytes)
    assert [[sample.advantage for sample in samples] for samples in kept] == [[-0.5]]
    assert without == 1


def test_no_groups_are_no_samples() -> None:
    assert assign([], np.zeros((0, 4)), CreditConfig(), "hermes", token_bytes) == ([], 0)


def test_rewards_of_other_groups_are_not_paired_silently() -> None:
    with pytest.raises(ValueError, match="zip"):
        assign(GROUPS, REWARDS_PG[:2], CreditConfig(), "hermes", token_bytes)
    with pytest.raises(ValueError, match="zip"):
        assign(GROUPS, REWARDS_PG[:, :2], CreditConfig(), "hermes", token_bytes)
