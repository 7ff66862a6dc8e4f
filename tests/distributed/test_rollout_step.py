"""Rounds of prompts on real ranks: what is drawn and kept, and that players change nothing."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rest_mega.config import ParallelConfig, RunConfig
from rest_mega.data.prompts import PromptStream
from rest_mega.records import Prompt, Trajectory, Turn
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

PROMPTS = [Prompt(f"p{n}", ()) for n in range(5)]
STEPS, WANTED, SIBLINGS = 3, 4, 2


def value(t: Trajectory) -> float:
    """Rewards in three grades, so that about a third of the pairs are equal."""
    return float(zlib.crc32(f"{t.stop}".encode()) // 7 % 3)


class Player:
    """A collector whose trajectories say in `stop` what they were drawn from."""

    repeatable = True

    def __init__(self, stops_at: int | None) -> None:
        self.calls, self._stops_at = 0, stops_at

    def open(self, prompt: Prompt, siblings: int, seed: str, first: int) -> Any:
        from rest_mega.rollout.episode import Group

        numbers = range(first, first + siblings)
        return Group(prompt, seed, [_trajectory(prompt, g, seed) for g in numbers])

    def restore(self, *_: Any) -> None: ...

    def play(self, *_: Any) -> bool:
        self.calls += 1
        return self.calls != self._stops_at


def _trajectory(prompt: Prompt, sibling: int, seed: object) -> Trajectory:
    mask_T = np.array([False, True, True])
    where_T = np.where(mask_T, 0, -1).astype(np.int32)
    return Trajectory(
        prompt=prompt,
        sibling=sibling,
        ids_T=np.array([0, 1, 2], np.int32),
        logprobs_T=np.float32([0, -1, -1]),
        mask_T=mask_T,
        turn_T=where_T,
        version_T=where_T,
        turns=(Turn(1, 3, "", True),),
        stop=f"{prompt.id}/{sibling}/{seed}",
    )


def rubric(groups: Sequence[Sequence[Trajectory]], step: float) -> Any:
    rewards_PG = np.array([[value(t) for t in group] for group in groups], np.float64)
    return (rewards_PG if groups else np.zeros((0, 0))), {"grade": rewards_PG}


def _every(
    names: Sequence[str], stops: tuple[int, int] | None = None, tensor: int = 1
) -> dict[str, Any]:
    """Per method and step what this player holds; `stops`: (rank, call) at which a stop is asked
    for."""
    from rest_mega.trainer import parallel as places

    place = places.start(ParallelConfig(tensor=tensor), "cpu")
    return {name: _steps(place, METHODS[name], stops) for name in names}


def _steps(place: Any, credit: dict[str, Any], stops: tuple[int, int] | None) -> list[Any]:
    from rest_mega.rollout.bank import Shelf
    from rest_mega.rollout_step import Rollouts

    tree = {"rollout": {"prompts_per_step": WANTED, "samples_per_prompt": SIBLINGS}}
    player = Player(stops[1] if stops and stops[0] == place.rank else None)
    session: Any = SimpleNamespace(
        config=RunConfig.from_dict(tree | {"credit": credit}),
        place=place,
        collector=player,
        bank=SimpleNamespace(shelf=lambda step: Shelf({})),
        inputs=SimpleNamespace(
            train=PROMPTS,
            rubric=rubric,
            tokenizer=SimpleNamespace(token_bytes=lambda i: b"ab"[i - 1 : i]),
        ),
        stop=lambda: False,
    )
    stream, answer = PromptStream(PROMPTS, 0), []
    rollouts = Rollouts(session, stream)
    for step in range(1, STEPS + 1):
        rollout = rollouts.play(step)
        if rollout is None:
            answer.append(None)
            continue
        view, advantages = rollout.view, [s.advantage for s in rollout.own]
        answer.append(
            {
                "played": [
                    (number, t.prompt.id, t.sibling, t.stop, float(view.rewards_PG[p, g]),
                     float(view.advantages_PG[p, g]), view.trained_P[p])
                    for p, number in enumerate(view.round_P)
                    for g, t in enumerate(view.groups[p])
                ],
                "trained": [t.stop for t in view.trained],
                "advantages": advantages,
                "samples": [s.advantage for s in rollout.samples],
                "grades": view.parts["grade"].ravel().tolist(),
                "counts": rollout.counts,
                "stream": stream.state(),
            }
        )  # fmt: skip
    return answer


METHODS = {
    "grpo": {"equal_groups": "resample"},
    "baseline": {"equal_groups": "resample", "advantage": "reinforce++-baseline"},
    "one round": {"equal_groups": "resample", "resample_rounds": 1},
    "global": {"advantage": "reinforce++"},
    "drop": {"advantage": "reinforce++-baseline"},
    "keep": {"equal_groups": "keep"},
}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return dict(run_ranks(_every, 1, list(METHODS))[0])


@pytest.fixture(scope="module", params=["two replicas", "a replica on two machines"])
def players(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    if request.param == "two replicas":
        return run_ranks(_every, 2, list(METHODS))
    return run_ranks(_every, 2, list(METHODS), None, 2, machines=2)


@pytest.mark.parametrize("name", METHODS)
def test_players_play_the_same_prompts_and_give_every_sibling_the_same_advantage_to_the_bit(
    name: str, alone: dict[str, Any], players: list[dict[str, Any]]
) -> None:
    for one, *shares in zip(alone[name], *(rank[name] for rank in players), strict=True):
        for name_ in ("played", "trained", "advantages"):
            together = [row for share in shares for row in share[name_]]
            assert sorted(together) == sorted(one[name_])
        for share in shares:
            assert (share["counts"], share["stream"]) == (one["counts"], one["stream"])
        whole = {tuple(share["samples"]) for share in shares}  # of each replica, on all its ranks
        assert sorted(a for part in whole for a in part) == sorted(one["samples"])


def rounds_of(step: dict[str, Any]) -> list[list[tuple[str, bool]]]:
    """(prompt, has signal) of every round's groups, from the rewards alone."""
    found: dict[int, dict[tuple[int, str], list[float]]] = {}
    for place, (number, name, _, _, reward, _, _) in enumerate(step["played"]):
        found.setdefault(number, {}).setdefault((place // SIBLINGS, name), []).append(reward)
    return [
        [(name, len(set(rewards)) > 1) for (_, name), rewards in found[number].items()]
        for number in sorted(found)
    ]


@pytest.mark.parametrize("name", ["grpo", "baseline", "one round"])
def test_a_round_draws_what_is_missing_and_the_next_prompts_of_the_stream(
    name: str, alone: dict[str, Any]
) -> None:
    stream, most = PromptStream(PROMPTS, 0), 1 if name == "one round" else 3
    short = 0
    for step in alone[name]:
        rounds, missing = rounds_of(step), WANTED
        for played in rounds:
            assert [prompt for prompt, _ in played] == [p.id for p in stream.next(missing)]
            missing -= sum(signal for _, signal in played)
        assert len(rounds) == 1 + most or missing == 0
        short += missing
        groups = [group for played in rounds for group in played]
        assert step["counts"] == {
            "groups/without_signal": pytest.approx(np.mean([not signal for _, signal in groups])),
            "groups/trained": WANTED - missing,
            "groups/resampled": len(groups) - WANTED,
            "groups/rounds": len(rounds),
            "groups/carried": 0,
        }
        assert step["trained"] == [stop for _, _, _, stop, _, _, kept in step["played"] if kept]
        assert len(step["advantages"]) == SIBLINGS * (WANTED - missing)
        assert step["grades"] == [reward for _, _, _, _, reward, _, _ in step["played"]]
        assert step["stream"] == stream.state()
    assert sum(step["counts"]["groups/resampled"] for step in alone[name]) > 0
    assert short > 0 or name != "one round"  # a step that stays short is among them


def test_a_prompt_that_comes_again_in_a_later_round_is_played_anew(alone: dict[str, Any]) -> None:
    again = 0
    for step in alone["grpo"]:
        rounds: dict[tuple[str, int], set[int]] = {}
        draws: dict[str, set[int]] = {}
        for number, name, sibling, draw, *_ in step["played"]:
            rounds.setdefault((name, sibling), set()).add(number)
            draws.setdefault(draw, set()).add(number)
        again += sum(len(numbers) > 1 for numbers in rounds.values())
        assert all(len(numbers) == 1 for numbers in draws.values())
    assert again > 0


def test_the_global_method_trains_on_equal_groups_and_keep_on_all(alone: dict[str, Any]) -> None:
    for name in ("global", "keep"):
        assert all(step["counts"]["groups/trained"] == WANTED for step in alone[name])
    assert all(step["counts"]["groups/without_signal"] == 0 for step in alone["global"])
    assert any(step["counts"]["groups/without_signal"] > 0 for step in alone["keep"])
    for step in alone["global"]:
        assert np.mean(step["advantages"]) == pytest.approx(0, abs=1e-6)
        assert np.std(step["advantages"]) == pytest.approx(1, abs=1e-6)
    for step in alone["drop"]:  # of what is trained on
        assert np.std(step["advantages"]) == pytest.approx(1, abs=1e-6)


def test_a_stop_that_one_player_sees_in_a_later_round_ends_the_step_on_all() -> None:
    for answer in run_ranks(_every, 2, ["grpo"], (1, 2)):
        assert answer["grpo"][0] is None
