"""Episodes are kept to the bit, go on where they were stopped, and a crash leaves what it did not
touch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rest_mega.config import ConfigError, RolloutConfig, RunConfig
from rest_mega.environments import ENVIRONMENTS
from rest_mega.records import Trajectory
from rest_mega.rollout.bank import Bank, NoBank, ReadOnlyBank, as_lines, stamp_of
from rest_mega.rollout.embedded_engine import EmbeddedEngine
from rest_mega.rollout.engine import Sampling
from rest_mega.rollout.engines import make_engine
from rest_mega.rollout.episode import Group, key_of_row, row_of, trajectory_of
from rest_mega.rollout.replay_engine import ReplayEngine
from rest_mega.rollout.sglang_placement import Machine
from tests.support.models import save_model
from tests.support.rollouts import (
    SEED,
    TOKENIZER,
    Counter,
    OneByOne,
    ScriptedEngine,
    assert_made_of_its_parts,
    call,
    collector,
    prompt,
)

SCRIPTS = {
    ("a", 0): [call(2), call(3), "5"], ("a", 1): ["5"],
    ("b", 0): ["<tool_call>\n{oops", call(9), "9"], ("b", 1): [call(1), "2"],
    ("c", 0): [call('"x"'), "0"], ("c", 1): [call(4) + "\n" + call(5), "9"],
}  # fmt: skip


def same(one: Trajectory, other: Trajectory, *, versions: bool = True) -> None:
    for name in ("ids_T", "logprobs_T", "mask_T", "turn_T", "version_T"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.dtype == theirs.dtype
        if versions or name != "version_T":
            np.testing.assert_array_equal(mine, theirs)
    assert (one.prompt, one.sibling) == (other.prompt, other.sibling)
    for mine, theirs in zip(one.turns, other.turns, strict=True):
        outcomes = [[dataclasses.replace(o, seconds=0) for o in t.outcomes] for t in (mine, theirs)]
        assert outcomes[0] == outcomes[1]
        assert dataclasses.replace(mine, outcomes=()) == dataclasses.replace(theirs, outcomes=())
    assert (one.stop, one.result) == (other.stop, other.result)


def played(engine: Any, names: str = "abc", need: int | None = None) -> list[Group]:
    """Groups of two siblings, played until `need` are done."""
    mine = collector(engine)
    groups = [mine.open(prompt(name), 2, SEED) for name in names]
    assert mine.play(groups, Sampling(), need)
    return groups


def rows_of(groups: list[Group]) -> dict[str, Any]:
    """As a later process reads them."""
    rows = [row_of(member, group.seed) for group in groups for member in group.members]
    read = [json.loads(line) for line in as_lines(rows).splitlines()]
    return {key_of_row(row): row for row in read}


# ------------------------------------------------------------------ rows


def test_a_trajectory_comes_back_from_its_row_to_the_bit() -> None:
    for group in played(ScriptedEngine(SCRIPTS)):
        for t in group.trajectories:
            odd = np.float32([0.1, -np.pi, 1e-38, -np.inf])
            logprobs_T = np.resize(odd, len(t.ids_T)).astype(np.float32)
            t = dataclasses.replace(t, logprobs_T=logprobs_T)
            row = json.loads(as_lines([row_of(t, SEED)]))
            back = trajectory_of(row, t.prompt)
            same(back, t)
            assert [turn.outcomes for turn in back.turns] == [turn.outcomes for turn in t.turns]


def test_a_verdict_keeps_its_numbers_and_one_that_json_has_not_is_refused() -> None:
    (group,) = played(ScriptedEngine({("a", 0): ["5"], ("a", 1): ["5"]}), "a")
    t = dataclasses.replace(group.trajectories[0], result={"success": np.bool_(True), "n": 1})
    assert json.loads(json.dumps(row_of(t, SEED)))["result"] == {"success": True, "n": 1}
    t = dataclasses.replace(t, result={"success": object()})
    with pytest.raises(RuntimeError, match=r"'test counter' on prompt 'a'.*finish\(\).*bank=false"):
        row_of(t, SEED)


# ------------------------------------------------------------------ stopped and gone on


@pytest.mark.parametrize("need", [0, 1, 2])
@pytest.mark.parametrize("kind", [ScriptedEngine, OneByOne])
@pytest.mark.parametrize("anew", [False, True])
def test_episodes_that_were_stopped_go_on_as_if_they_had_not_been(
    need: int, kind: Any, anew: bool
) -> None:
    """In the same process, and from rows in another one, whose environments are new."""
    want = played(ScriptedEngine(SCRIPTS))
    groups = played(kind(SCRIPTS), need=need)
    assert sum(group.done for group in groups) >= need
    engine = kind(SCRIPTS, version=50)
    mine = collector(engine)
    if anew:
        rows, groups = rows_of(groups), [mine.open(prompt(name), 2, SEED) for name in "abc"]
        mine.restore(groups, rows)
    assert mine.play(groups, Sampling())
    for group, other in zip(groups, want, strict=True):
        for t, undisturbed in zip(group.trajectories, other.trajectories, strict=True):
            assert_made_of_its_parts(t)
            same(t, undisturbed, versions=False)


def test_a_turn_that_was_cut_short_goes_on_under_its_newer_version() -> None:
    groups = played(OneByOne(SCRIPTS), "ab", need=1)
    left = groups[1]
    assert not left.done
    engine = OneByOne(SCRIPTS, version=50)
    assert collector(engine).play(groups, Sampling())
    first, *_ = left.trajectories
    versions = first.version_T[first.turn_T == 0]
    assert versions[: OneByOne.reached].max() < 50
    assert versions[OneByOne.reached :].min() >= 50


def test_an_episode_whose_tools_answer_otherwise_now_begins_anew() -> None:
    stopped = played(ScriptedEngine({("a", g): [call(2), call(3), "5"] for g in (0, 1)}), "a")
    rows = rows_of(stopped)
    for row in rows.values():  # as if the episodes had been stopped after their first turn
        first, second = (row["turns"][n]["start"] for n in (0, 1))
        assert first < second
        row["stop"], row["turns"] = "", row["turns"][:1]
        for name in ("ids", "logprobs", "turn", "version"):
            row[name] = _cut(row[name], second)
    mine = collector(ScriptedEngine(SCRIPTS))
    group = mine.open(prompt("a"), 2, SEED)
    mine.restore([group], rows)
    assert [len(member.turns) for member in group.members] == [1, 1]

    class Liar(Counter):
        def call(self, call: Any) -> str:
            return super().call(call) + "!"

    ENVIRONMENTS["test counter"] = Liar
    try:
        group = mine.open(prompt("a"), 2, SEED)
        mine.restore([group], rows)
        assert [len(member.turns) for member in group.members] == [0, 0]
    finally:
        ENVIRONMENTS["test counter"] = Counter


def _cut(text: str, length: int) -> str:
    import base64

    return base64.b64encode(base64.b64decode(text)[: 4 * length]).decode()


def test_another_prompt_of_the_same_name_is_played_anew() -> None:
    rows = rows_of(played(ScriptedEngine(SCRIPTS)))
    mine = collector(ScriptedEngine(SCRIPTS))
    other = mine.open(prompt("a", content="Add 20 and 30."), 2, SEED)
    mine.restore([other], rows)
    assert other.open == [0, 1]


# ------------------------------------------------------------------ files


def kept(bank: Bank, step: int, groups: list[Group]) -> Path:
    shelf = bank.shelf(step)
    shelf.add((group.seed, member) for group in groups for member in group.members)
    shelf.close()
    return next(iter(sorted(bank._folder.glob(f"step_{step:08d}.*"))))


def test_a_file_cut_off_at_any_byte_gives_the_episodes_before_the_cut(tmp_path: Path) -> None:
    bank, groups = Bank(tmp_path, "mine", 0), played(ScriptedEngine(SCRIPTS))
    file = kept(bank, 3, groups)
    whole, rows = file.read_bytes(), rows_of(groups)
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for size in [*range(0, len(whole), 97), *ends, *(end - 1 for end in ends)]:
        file.write_bytes(whole[:size])
        shelf = bank.shelf(3)
        assert shelf.rows == dict(list(rows.items())[: max(0, sum(e <= size for e in ends) - 1)])
        shelf.add((group.seed, member) for group in groups for member in group.members)
        shelf.close()
        assert bank.shelf(3).rows == rows  # what was cut off has been added again


def test_files_of_another_configuration_are_left_out_and_replaced(tmp_path: Path) -> None:
    groups = played(ScriptedEngine(SCRIPTS))
    kept(Bank(tmp_path, "theirs", 0), 3, groups)
    kept(Bank(tmp_path, "theirs", 1), 3, groups)
    bank = Bank(tmp_path, "mine", 0)
    shelf = bank.shelf(3)
    assert shelf.rows == {}
    shelf.close()
    kept(bank, 3, groups[:1])
    assert bank.shelf(3).rows == rows_of(groups[:1])


def test_every_replica_finds_what_any_has_kept(tmp_path: Path) -> None:
    groups = played(ScriptedEngine(SCRIPTS))
    for replica in (0, 1):
        kept(Bank(tmp_path, "mine", replica), 3, groups[replica::2])
    assert Bank(tmp_path, "mine", 5).shelf(3).rows == rows_of(groups)


def test_a_checkpoint_removes_its_step_and_those_before(tmp_path: Path) -> None:
    bank, groups = Bank(tmp_path, "mine", 0), played(ScriptedEngine(SCRIPTS))
    for step in (8, 9, 10, 11):
        kept(bank, step, groups)
    bank.prune(9)
    bank.forget(11)
    assert [bool(bank.shelf(step).rows) for step in (8, 9, 10, 11)] == [False, False, True, False]
    NoBank(tmp_path)
    assert not list(tmp_path.glob("step*"))


def test_an_episode_that_is_played_anew_takes_later_steps_with_it(tmp_path: Path) -> None:
    """Their policy would have learned from what is not trained on again."""
    bank, groups = Bank(tmp_path, "mine", 0), played(ScriptedEngine(SCRIPTS))
    for step in (3, 4):
        kept(bank, step, groups)
    kept(bank, 3, groups)  # nothing new
    assert bank.shelf(4).rows
    kept(bank, 2, groups[:1])
    assert not bank.shelf(3).rows
    assert not bank.shelf(4).rows


def test_a_line_that_is_no_episode_is_refused_with_the_file(tmp_path: Path) -> None:
    bank, groups = Bank(tmp_path, "mine", 0), played(ScriptedEngine(SCRIPTS))
    file = kept(bank, 3, groups)
    for line in ("{", "[]", "null", "{}"):
        file.write_text(f'{{"stamp": "mine"}}\n{line}\n')
        with pytest.raises(
            ConfigError, match=r"step_00000003\.0\.jsonl holds a line.*played again"
        ):
            bank.shelf(3)


def test_what_decides_the_episodes_is_in_the_stamp_and_nothing_else(tmp_path: Path) -> None:
    module = tmp_path / "tools.py"
    module.write_text("x = 1\n")

    def stamp(*words: str, **sections: Any) -> str:
        tree: dict[str, Any] = {"environment": {"modules": [str(module)]}}
        return stamp_of(RunConfig.from_dict(tree | sections))

    first = stamp()
    for change in (
        {"rollout": {"temperature": 0.9}}, {"optimizer": {"lr": 1e-3}}, {"run": {"seed": 1}},
        {"credit": {"preset": "uniform"}}, {"data": {"train": "x"}}, {"loss": {"clip_low": 0.1}},
    ):  # fmt: skip
        assert stamp(**change) != first
    for change in (
        {"parallel": {"tensor": 2}}, {"run": {"save_every": 3}}, {"rollout": {"engine": "sglang"}},
        {"telemetry": {"trajectories": 0}}, {"guard": {"every": 0}},
    ):  # fmt: skip
        assert stamp(**change) == first
    module.write_text("x = 2\n")
    assert stamp() != first


# ------------------------------------------------------------------ a real model, and replay


@torch.no_grad()
def test_a_models_trajectories_hold_its_own_logprobs_and_replay_as_they_were(
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    path = save_model(
        tmp_path / "qwen3", "qwen3", vocab_size=TOKENIZER.vocab_size + 20, num_hidden_layers=1,
        hidden_size=32, initializer_range=0.02, max_position_embeddings=2048,
    )  # fmt: skip
    sampling, limits = Sampling(temperature=1.1), {"max_new_tokens": 40, "max_turns": 3}
    names = "abcdef"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engine = engine_of(path, tmp_path, batch_size=5)
    assert isinstance(engine, EmbeddedEngine)
    engine.load_parameters(model.named_parameters(), 3)
    mine = collector(engine, **limits)
    groups = [mine.open(prompt(name, content=f"Add {name}."), 4, SEED) for name in names]
    assert mine.play(groups, sampling)
    assert any(len(t.turns) > 1 for group in groups for t in group.trajectories)
    for group in groups:
        for t in group.trajectories:
            assert_made_of_its_parts(t)
            ids = torch.from_numpy(t.ids_T.astype(np.int64))
            logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1] / 1.1, dim=-1)
            want = np.append(0, logprobs.gather(1, ids[1:, None])[:, 0].numpy())
            np.testing.assert_allclose(t.logprobs_T[t.mask_T], want[t.mask_T], atol=1e-5)
            assert set(t.version_T[t.mask_T]) == {3}
    # A group does not depend on the prompts beside it.
    for group in groups[:2]:
        alone = mine.collect([group.prompt], 4, sampling, SEED)
        assert alone is not None
        for t, other in zip(alone[0], group.trajectories, strict=True):
            np.testing.assert_allclose(t.logprobs_T, other.logprobs_T, atol=1e-5)
            assert t.ids_T.tolist() == other.ids_T.tolist()
    kept(Bank(tmp_path / "bank", "x", 0), 1, groups)
    replay = engine_of(path, tmp_path, engine="replay", replay=str(tmp_path / "bank"))
    assert isinstance(replay, ReplayEngine)
    again = collector(replay, **limits)
    mirrored = [again.open(group.prompt, 4, SEED) for group in groups]
    again.restore(mirrored, ReadOnlyBank(tmp_path / "bank").shelf(1).rows)
    assert again.play(mirrored, sampling)
    for group, other in zip(mirrored, groups, strict=True):
        for t, want in zip(group.trajectories, other.trajectories, strict=True):
            same(t, want)
    with pytest.raises(ConfigError, match=r"1 episodes are not in rollout\.replay=.*run\.seed"):
        again.collect([prompt("unknown")], 1, sampling, SEED)


def engine_of(path: Path, folder: Path, **settings: Any) -> Any:
    return make_engine(
        RolloutConfig(**settings),
        model_path=str(path),
        dtype="fp32",
        tokenizer=TOKENIZER,
        device=torch.device("cpu"),
        folder=folder,
        machine=Machine(0, (0,), (0,), 1, 0),
    )


def test_a_folder_without_a_bank_is_refused_with_the_way_to_keep_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}.*step_\*\.jsonl.*rollout\.record=true"):
        ReadOnlyBank(tmp_path)
