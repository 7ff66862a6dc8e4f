"""examples/extending: dialect, tools, environment and reward in one episode."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from rest_mega.config import ConfigError, EnvironmentConfig, RewardConfig, RolloutConfig
from rest_mega.dialects import DIALECTS, Region, add_dialect, parse
from rest_mega.environments import ENVIRONMENTS, load_modules
from rest_mega.records import Prompt
from rest_mega.rewards import Rubric
from rest_mega.rewards.rubric import RUBRIC
from rest_mega.rollout.collect import Collector
from rest_mega.rollout.engine import Sampling
from tests.support.rollouts import CHAT, SEED, TOKENIZER, ScriptedEngine

MINE = Path(__file__).parents[3] / "examples" / "extending" / "mine.py"


@pytest.fixture(scope="module")
def mine() -> Iterator[ModuleType]:
    """The example, registered for the tests of this file alone."""
    (module,) = load_modules([str(MINE)])
    yield module
    tables: tuple[tuple[dict, str], ...] = (
        (DIALECTS, "brackets"), (ENVIRONMENTS, "notes"), (RUBRIC, "short"),
    )  # fmt: skip
    for table, name in tables:
        del table[name]
    del sys.modules[module.__name__]


def call(name: str, arguments: str) -> str:
    return f'[think]so[/think]\n[call]{{"name": "{name}", "arguments": {arguments}}}[/call]'


def test_an_episode_with_all_of_it(mine: ModuleType) -> None:
    """Two notes, a refusal that the model reads, an answer; judged by the state."""
    said = [call("write", '{"text": "milk"}'), call("read", '{"number": 2}'), "done"]
    prompt = Prompt(
        "p", ({"role": "user", "content": "Note milk."},), environment="notes",
        task={"wanted": ["milk"]},
    )  # fmt: skip
    collector = Collector(
        ScriptedEngine({("p", 0): said}), TOKENIZER, CHAT, "brackets",
        RolloutConfig(max_tokens=1024, max_new_tokens=256), EnvironmentConfig(),
    )  # fmt: skip
    groups = collector.collect([prompt], 1, Sampling(), SEED)
    assert groups is not None
    (trajectory,) = groups[0]
    outcomes = [outcome for turn in trajectory.turns for outcome in turn.outcomes]
    assert [o.content for o in outcomes] == ['{"notes":1}', "error: there are 1 notes"]
    assert trajectory.result == {"success": True, "notes": 1}
    rubric = Rubric(RewardConfig(parts={"success": 1.0, "short": 3.0}))
    rewards, _ = rubric(groups, 1)
    assert rewards.tolist() == [[2.0]]


def test_the_dialect_marks_its_regions(mine: ModuleType) -> None:
    reply = parse(call("write", '{"text": "a"}').encode(), "brackets")
    assert reply.well_formed
    assert {Region.REASONING, Region.TOOL_NAME, Region.ARG_VALUE} <= set(reply.regions_B)
    with pytest.raises(ConfigError, match="'brackets' is there already"):
        add_dialect("brackets", DIALECTS["hermes"])
