"""Playing a benchmark: what is drawn, what is kept, and what a killed process leaves behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rest_mega.config import ConfigError, EvaluationConfig, RolloutConfig, RunConfig
from rest_mega.evaluation.benchmark import write_report
from rest_mega.evaluation.play import (
    Benchmark,
    open_benchmarks,
    play,
    rollout_of,
    sampling_of,
    settings_of,
)
from rest_mega.evaluation.results import Results, read_samples, read_settings
from rest_mega.evaluation.suite import Played, Result, Row, Task, Verdict, share
from rest_mega.records import Prompt
from rest_mega.rollout.engine import Sampling, seed_of
from tests.support.rollouts import ScriptedEngine, call, collector, prompt

SETTINGS = {"suite": "sums", "version": "1", "model": "scripted"}


class Sums:
    """Three tasks of the counting environment; `kill_at`: the judge kills its process there."""

    name, version, dialect, max_turns = "sums", "1", "", 3

    def __init__(self, kill_at: str = "") -> None:
        self.kill_at, self.judged = kill_at, list[str]()

    def categories(self) -> tuple[str, ...]:
        return ("sums",)

    def tasks(self, categories: Sequence[str] = ()) -> list[Task]:
        return [Task(prompt(name), "sums") for name in ("a", "b", "c", "d")]

    def judge(self, task: Task, played: Played) -> Verdict:
        if task.prompt.id == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.judged.append(task.prompt.id)
        right = bool(played.result.get("success"))
        return Verdict(right, "" if right else "wrong sum", "" if right else "not the total")

    def summary(self, results: Sequence[Result]) -> list[Row]:
        return [share("sums", results)]


LINES = {"a": [call(2), "2"], "b": [call(2), "7"], "c": ["<tool_call>{", "??"], "d": ["0"]}


class Scripted(ScriptedEngine):
    """Says LINES in the draws of a benchmark with the seed 0."""

    def __init__(self) -> None:
        super().__init__({})
        self._lines = {
            seed_of("benchmark/0", name, n, turn): text
            for name, lines in LINES.items()
            for n in range(2)
            for turn, text in enumerate(lines)
        }


def played(
    folder: Path, suite: Sums, samples: int = 1, together: int = 1, **limits: int
) -> list[dict[str, Any]]:
    benchmark = Benchmark(suite, suite.tasks(), samples)
    results = Results(folder, SETTINGS)
    done = play(
        collector(Scripted(), **limits), benchmark, benchmark.pairs, Sampling(), 0, results,
        together=together, tick=lambda: None,
    )  # fmt: skip
    assert done
    return read_samples(folder)


def test_every_sample_is_kept_with_all_that_an_audit_needs(tmp_path: Path) -> None:
    rows = {row["task"]: row for row in played(tmp_path, Sums())}
    assert {name: row["valid"] for name, row in rows.items()} == {
        "a": True, "b": False, "c": False, "d": True,
    }  # fmt: skip
    right = rows["a"]
    assert [turn["text"] for turn in right["turns"]] == LINES["a"]
    assert right["turns"][0]["calls"] == [{"name": "add", "arguments": {"number": 2}}]
    assert right["turns"][0]["outcomes"][0]["content"] == "total 2"
    assert len(right["output_ids"]) == 2
    assert [len(ids) for ids in right["output_ids"]] == [
        turn["end"] - turn["start"] for turn in right["turns"]
    ]
    assert len(right["prompt_ids"]) == right["turns"][0]["start"]
    assert (rows["b"]["kind"], rows["b"]["reason"]) == ("wrong sum", "not the total")
    assert rows["c"]["turns"][0]["outcomes"][0]["status"] == "malformed"


def test_what_a_killed_process_has_judged_is_never_drawn_again(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # killed by its third judgement; whatever else it does is a failure
        played(tmp_path, Sums(kill_at="c"))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    kept = (tmp_path / "samples.jsonl").read_bytes()
    assert [json.loads(line)["task"] for line in kept.splitlines()] == ["a", "b"]
    suite = Sums()
    rows = played(tmp_path, suite)
    assert suite.judged == ["c", "d"]
    assert (tmp_path / "samples.jsonl").read_bytes().startswith(kept)
    whole = played(tmp_path / "whole", Sums())
    for row in (*rows, *whole):  # the clock apart
        for turn in row["turns"]:
            for outcome in turn["outcomes"]:
                outcome["seconds"] = 0
    assert rows == whole


def test_a_half_written_line_is_drawn_anew(tmp_path: Path) -> None:
    played(tmp_path, Sums())
    file = tmp_path / "samples.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    suite = Sums()
    assert len(played(tmp_path, suite)) == 4
    assert suite.judged == ["d"]
    assert [line[:60] for line in file.read_bytes().splitlines()] == [
        line[:60] for line in whole.splitlines()
    ]


def test_more_samples_of_each_task_go_on_from_the_first(tmp_path: Path) -> None:
    played(tmp_path, Sums())
    suite = Sums()
    assert len(played(tmp_path, suite, samples=2, together=3)) == 8
    assert sorted(suite.judged) == ["a", "b", "c", "d"]


def test_a_prompt_that_leaves_no_room_is_a_wrong_answer(tmp_path: Path) -> None:
    rows = played(tmp_path, Sums(), max_tokens=20)
    assert {row["stop"] for row in rows} == {"prompt_length"}
    assert not any(row["valid"] for row in rows)
    assert "20" in rows[0]["note"]


def test_a_turn_that_never_ends_is_scored(tmp_path: Path) -> None:
    rows = played(tmp_path, Sums(), max_new_tokens=1)
    assert {row["stop"] for row in rows} == {"token_limit"}
    assert len(rows) == 4


@pytest.mark.parametrize("line", ["{oh", '{"task": "a"}', "[1]", '{"task":"a","sample":0}'])
def test_a_line_that_is_no_sample_is_named(tmp_path: Path, line: str) -> None:
    played(tmp_path, Sums())
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=r"samples\.jsonl:5: .*take the line out"):
        Results(tmp_path, SETTINGS)


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    played(tmp_path, Sums())
    with pytest.raises(ConfigError, match=r"model was 'scripted', is 'other'.*--fresh"):
        Results(tmp_path, {**SETTINGS, "model": "other"})
    assert read_settings(tmp_path) == SETTINGS
    with pytest.raises(ConfigError, match="holds no results"):
        read_settings(tmp_path / "absent")


def test_the_report_has_the_table_and_the_failures_escaped(tmp_path: Path) -> None:
    suite = Sums()
    played(tmp_path, suite)
    metrics = write_report(Benchmark(suite, suite.tasks(), 1), tmp_path)
    assert metrics == {"eval/sums/sums": 0.5}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failures"] == {"wrong sum": 2}
    assert summary["rows"][0]["count"] == 4
    assert summary["packages"]["numpy"]
    page = (tmp_path / "failures.html").read_text("utf-8")
    assert "&lt;tool_call&gt;{" in page
    assert "<tool_call>" not in page
    assert "http" not in page
    assert "wrong sum</b> (2)" in page
    assert "50.0" in (tmp_path / "table.txt").read_text()


# ------------------------------------------------------------------ the config


def test_greedy_or_sampled() -> None:
    assert sampling_of(EvaluationConfig()) == Sampling(greedy=True)
    assert sampling_of(EvaluationConfig(temperature=0.7, top_p=0.9)) == Sampling(0.7, 0.9)
    with pytest.raises(ConfigError, match=r"samples=4 greedy replies would all be the same"):
        EvaluationConfig(samples=4)


def test_an_episode_has_the_benchmarks_own_limits() -> None:
    rollout = RolloutConfig(max_turns=9, max_new_tokens=7, max_tokens=70)
    mine = rollout_of(Sums(), EvaluationConfig(max_new_tokens=5), rollout)
    assert (mine.max_turns, mine.max_new_tokens, mine.max_tokens) == (3, 5, 70)


def test_settings_tell_the_sampling_and_not_the_choice_of_tasks() -> None:
    def settings(**keys: Any) -> dict[str, Any]:
        config = RunConfig(evaluation=EvaluationConfig(**keys))
        return settings_of(config, Benchmark(Sums(), (), 1), "template", "step 3")

    assert settings(limit=3) == settings()
    for keys in ({"temperature": 0.5}, {"seed": 1}, {"max_new_tokens": 9}):
        assert settings(**keys) != settings()


def test_suites_are_opened_with_their_categories_and_data() -> None:
    data = str(Path(__file__).parents[2] / "data" / "api_bank")
    config = EvaluationConfig(
        suites={"api-bank": ("level-1",)}, data={"api-bank": data}, limit=2, seed=3
    )
    (benchmark,) = open_benchmarks(config)
    assert {task.category for task in benchmark.tasks} == {"level-1"}
    assert len(benchmark.tasks) == 2
    with pytest.raises(ConfigError, match=r"key of evaluation.data='api_bank'"):
        open_benchmarks(EvaluationConfig(suites={"api-bank": ()}, data={"api_bank": data}))


def test_prompts_of_a_task_keep_their_environment() -> None:
    assert isinstance(Sums().tasks()[0].prompt, Prompt)
    assert Sums().tasks()[0].prompt.environment == "test counter"
