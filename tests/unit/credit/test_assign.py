"""Groups of trajectories and their rewards -> samples for the trainer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rest_mega.config import CreditConfig
from rest_mega.credit.advantages import BATCH_METHODS, METHODS, advantages
from rest_mega.credit.assign import assign, penalised, trained_groups
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


@pytest.mark.parametrize("method", [*METHODS, *BATCH_METHODS])
@pytest.mark.parametrize("what", ["keep", "drop", "resample"])
def test_samples_are_the_trajectories_with_regions_and_advantages(method: str, what: str) -> None:
    if (method, what) == ("reinforce++", "resample"):
        return  # refused by the config
    config = CreditConfig(advantage=method, equal_groups=what)
    trained_P = trained_groups(REWARDS_PG, config)
    everything = what == "keep" or method == "reinforce++"
    assert trained_P.tolist() == [True, everything, True]
    advantages_PG = advantages(REWARDS_PG, method)[trained_P]
    groups = [group for group, trained in zip(GROUPS, trained_P, strict=True) if trained]
    samples = assign(groups, advantages_PG, REWARDS_PG[trained_P], "hermes", token_bytes)
    assert [sample.advantage for sample in samples] == advantages_PG.ravel().tolist()
    for one, sample in zip(itertools.chain(*groups), samples, strict=True):
        assert np.array_equal(sample.ids_T, one.ids_T)
        assert np.array_equal(sample.mask_T, one.mask_T)
        assert np.array_equal(sample.logprobs_T, one.logprobs_T)
        expected_T = tag_trajectory(one, "hermes", token_bytes)
        assert np.array_equal(sample.regions_T, expected_T)


def test_kept_groups_without_signal_have_no_advantage() -> None:
    samples = assign(GROUPS, advantages(REWARDS_PG, "grpo"), REWARDS_PG, "hermes", token_bytes)
    assert [sample.advantage for sample in samples[3:6]] == [0, 0, 0]


def test_a_permuted_group_has_permuted_samples() -> None:
    order, a_PG = [2, 0, 1], advantages(REWARDS_PG, "grpo")
    plain = assign(GROUPS[:1], a_PG[:1], REWARDS_PG[:1], "hermes", token_bytes)
    shuffled = [[GROUPS[0][n] for n in order]]
    mixed_PG = REWARDS_PG[:1, order]
    again = assign(shuffled, advantages(mixed_PG, "grpo"), mixed_PG, "hermes", token_bytes)
    for n, sample in zip(order, again, strict=True):
        assert sample.advantage == pytest.approx(plain[n].advantage, rel=1e-6)
        assert np.array_equal(sample.ids_T, plain[n].ids_T)
        assert np.array_equal(sample.regions_T, plain[n].regions_T)


@pytest.mark.parametrize("method", [*METHODS, *BATCH_METHODS])
def test_penalised_advantages_are_those_of_the_reduced_rewards_in_any_order(method: str) -> None:
    config = CreditConfig(advantage=method)
    rewards_PG = REWARDS_PG[[0, 2]]
    plain_PG = advantages(rewards_PG, method)
    groups = [GROUPS[0], GROUPS[2]]
    samples = assign(groups, plain_PG, rewards_PG, "hermes", token_bytes)
    assert penalised(samples, np.zeros(6), config).tolist() == plain_PG.ravel().tolist()
    penalty_S = np.array([0.3, 0.1, 0.0, 2.0, 0.5, 0.25])
    want = advantages(rewards_PG - penalty_S.reshape(2, 3), method).ravel()
    order = [4, 0, 3, 1, 5, 2]
    got = penalised([samples[i] for i in order], penalty_S[order], config)
    assert got == pytest.approx(want[order], rel=1e-6)


@pytest.mark.parametrize("method", [*METHODS, *BATCH_METHODS])
def test_penalised_advantages_of_replicas_are_those_of_the_whole_batch(method: str) -> None:
    config = CreditConfig(advantage=method)
    rewards_PG = REWARDS_PG[[0, 2]]
    groups = [GROUPS[0], GROUPS[2]]
    samples = assign(groups, rewards_PG, rewards_PG, "hermes", token_bytes)
    penalty_S = np.array([0.3, 0.1, 0.0, 2.0, 0.5, 0.25])
    batch_PG = rewards_PG - penalty_S.reshape(2, 3)
    parts = [
        penalised(samples[a : a + 3], penalty_S[a : a + 3], config, lambda _: batch_PG)
        for a in (0, 3)
    ]
    assert np.array_equal(np.concatenate(parts), penalised(samples, penalty_S, config))


def test_a_kept_group_of_equal_rewards_is_told_apart_by_its_penalties_alone() -> None:
    config = CreditConfig(equal_groups="keep", advantage="dr_grpo")
    samples = assign([GROUPS[1]], REWARDS_PG[1:2], REWARDS_PG[1:2], "hermes", token_bytes)
    got = penalised(samples, np.array([0.0, 0.3, 0.6]), config)
    assert got == pytest.approx([0.3, 0.0, -0.3])


def test_no_samples_have_no_penalised_advantages() -> None:
    assert penalised([], np.zeros(0), CreditConfig()).tolist() == []


def test_groups_of_one_are_kept_by_their_reward() -> None:
    rewards_PG = np.array([[-0.5], [0.0]])
    assert trained_groups(rewards_PG, CreditConfig()).tolist() == [True, False]
    a_PG = advantages(rewards_PG, "grpo")[:1]
    samples = assign([[GROUPS[0][0]]], a_PG, rewards_PG[:1], "hermes", token_bytes)
    assert [sample.advantage for sample in samples] == [-0.5]


def test_no_groups_are_no_samples() -> None:
    assert assign([], np.zeros((0, 4)), np.zeros((0, 4)), "hermes", token_bytes) == []
    assert trained_groups(np.zeros((0, 4)), CreditConfig()).tolist() == []


def test_advantages_of_other_groups_are_not_paired_silently() -> None:
    for wrong_PG in (REWARDS_PG[:2], REWARDS_PG[:, :2]):
        with pytest.raises(ValueError, match="zip"):
            assign(GROUPS, wrong_PG, REWARDS_PG, "hermes", token_bytes)
