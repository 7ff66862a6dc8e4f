"""Recorded rollouts replay as they were; what is no recording is refused with its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rest_mega.config import ConfigError, RolloutConfig
from rest_mega.records import Trajectory
from rest_mega.rollout.embedded_engine import EmbeddedEngine
from rest_mega.rollout.engine import Completion, Engine, Request, Sampling
from rest_mega.rollout.engines import make_engine
from rest_mega.rollout.replay_engine import RecordingEngine, ReplayEngine
from tests.support.models import save_model
from tests.support.rollouts import (
    SEED,
    TOKENIZER,
    ScriptedEngine,
    assert_made_of_its_parts,
    call,
    collector,
    prompt,
)

PROMPTS = [prompt(name, content=f"Add {name}.") for name in "abcdef"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy that is nearly uniform, so that it says every special token now and then."""
    return str(
        save_model(
            tmp_path_factory.mktemp("qwen3"), "qwen3", vocab_size=TOKENIZER.vocab_size + 20,
            num_hidden_layers=1, hidden_size=32, initializer_range=0.02,
            max_position_embeddings=2048,
        )
    )  # fmt: skip


def make(path: str, folder: Path, **settings: Any) -> Engine:
    engine = make_engine(
        RolloutConfig(**settings),
        model_path=path,
        dtype="fp32",
        tokenizer=TOKENIZER,
        device=torch.device("cpu"),
        record_to=folder / "step_1.jsonl",
        folder=folder,
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine.load_parameters(model.named_parameters(), 3)
    return engine


def collected(engine: Engine, prompts: list[Any], sampling: Sampling) -> list[list[Trajectory]]:
    groups = collector(engine, max_new_tokens=40, max_turns=3).collect(prompts, 4, sampling, SEED)
    assert groups is not None
    return groups


def flat(groups: list[list[Trajectory]]) -> Iterator[Trajectory]:
    return (t for group in groups for t in group)


def assert_same(got: list[list[Trajectory]], want: list[list[Trajectory]], atol: float) -> None:
    for one, other in zip(flat(got), flat(want), strict=True):
        assert one.ids_T.tolist() == other.ids_T.tolist()
        np.testing.assert_allclose(one.logprobs_T, other.logprobs_T, atol=atol)
        for name in ("mask_T", "turn_T", "version_T"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert [t.text for t in one.turns] == [t.text for t in other.turns]
        assert (one.stop, one.result, one.sibling) == (other.stop, other.result, other.sibling)


@torch.no_grad()
def test_a_models_trajectories_hold_its_own_logprobs_and_replay_as_recorded(
    path: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    sampling = Sampling(temperature=1.1)
    engine = make(path, tmp_path, record=True)
    assert isinstance(engine, RecordingEngine)
    groups = collected(engine, PROMPTS, sampling)
    assert any(len(t.turns) > 1 for t in flat(groups))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for t in flat(groups):
        assert_made_of_its_parts(t)
        ids = torch.from_numpy(t.ids_T.astype(np.int64))
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1] / 1.1, dim=-1)
        want = np.append(0, logprobs.gather(1, ids[1:, None])[:, 0].numpy())
        np.testing.assert_allclose(t.logprobs_T[t.mask_T], want[t.mask_T], atol=1e-5)
        assert set(t.version_T[t.mask_T]) == {3}
    engine.close()
    replay = make(path, tmp_path, engine="replay", replay=str(tmp_path))
    assert isinstance(replay, ReplayEngine)
    assert replay.version == 3  # the last announced, whatever was recorded
    assert_same(collected(replay, PROMPTS, sampling), groups, atol=0)
    assert_same(collected(replay, PROMPTS[3:], sampling), groups[3:], atol=0)
    replay.close()


def test_a_group_does_not_depend_on_the_prompts_beside_it(path: str, tmp_path: Path) -> None:
    engine = make(path, tmp_path, batch_size=5)
    assert isinstance(engine, EmbeddedEngine)
    together = collected(engine, PROMPTS[:3], Sampling())
    apart = [collected(engine, [p], Sampling())[0] for p in reversed(PROMPTS[:3])]
    assert_same(apart[::-1], together, atol=1e-5)


def test_greedy_and_sampled_completions_of_one_request_are_told_apart(tmp_path: Path) -> None:
    script = {("a", 0): ["x"]}
    for name, text, sampling in (("1", "x", Sampling()), ("2", "yy", Sampling(greedy=True))):
        engine = RecordingEngine(
            ScriptedEngine(script | {("a", 0): [text]}), tmp_path / f"{name}.jsonl"
        )
        collector(engine).collect([prompt("a")], 1, sampling, SEED)
        engine.close()
    replay = ReplayEngine(tmp_path)
    for text, sampling in (("x", Sampling()), ("yy", Sampling(greedy=True))):
        played = collector(replay).collect([prompt("a")], 1, sampling, SEED)
        assert played is not None
        assert played[0][0].turns[0].text == text


def test_recording_goes_on_in_a_file_that_exists(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "step_1.jsonl"
    for name in "ab":
        engine = RecordingEngine(ScriptedEngine({(name, 0): [call(1), "1"]}), file)
        assert engine.version == 6
        collector(engine).collect([prompt(name)], 1, Sampling(), SEED)
        engine.close()
    played = collector(ReplayEngine(file.parent)).collect(
        [prompt("a"), prompt("b")], 1, Sampling(), SEED
    )
    assert played is not None
    assert [t.result["success"] for t in flat(played)] == [True, True]


def test_a_request_that_was_not_recorded_is_refused(tmp_path: Path) -> None:
    engine = RecordingEngine(ScriptedEngine({("a", 0): ["x"]}), tmp_path / "1.jsonl")
    collector(engine).collect([prompt("a")], 1, Sampling(), SEED)
    for seed, name in ((SEED, "b"), ("other seed", "a")):
        with pytest.raises(ConfigError, match=r"was not recorded: replay needs the run\.seed"):
            collector(ReplayEngine(tmp_path)).collect([prompt(name)], 1, Sampling(), seed)


def test_an_empty_folder_is_refused_with_the_way_to_record(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}.*\*\.jsonl.*rollout\.record=true first"):
        ReplayEngine(tmp_path)


GOOD = '{"key": [1, 2, false], "ids": [3], "logprobs": [-0.5], "finished": true, "versions": [1]}'


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", "null", GOOD.replace("[3]", '["x"]'), GOOD.replace("[3]", "[3, 4]"),
     GOOD.replace("[1, 2, false]", "7"), GOOD.replace('"versions": [1]', '"versions": null'),
     GOOD.replace('"versions": [1]', '"versions": [1, 1]'),
     GOOD.replace("[-0.5]", "[[-0.5]]"), GOOD.replace("[3]", "3"), GOOD.replace("[3]", "[1e99]")],
)  # fmt: skip
def test_a_line_that_is_no_completion_is_named_by_file_and_number(
    tmp_path: Path, line: str
) -> None:
    (tmp_path / "step_1.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ConfigError, match=r"step_1\.jsonl:2: not a recorded completion.*anew"):
        ReplayEngine(tmp_path)


def test_a_recorded_line_is_what_was_completed(tmp_path: Path) -> None:
    (tmp_path / "step_1.jsonl").write_text(GOOD + "\n")
    (done,) = ReplayEngine(tmp_path).generate([Request(np.array([8, 8]), 5, 1)], Sampling())
    assert isinstance(done, Completion)
    assert (done.ids_T.tolist(), done.logprobs_T.tolist()) == ([3], [-0.5])
    assert (done.finished, done.version_T.tolist()) == (True, [1])
