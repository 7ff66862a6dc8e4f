"""The built-in reward functions; each judges one whole trajectory and registers its name."""

from __future__ import annotations

from rest_mega.config import ConfigError
from rest_mega.records import ToolCall, Trajectory
from rest_mega.rewards import toolrl
from rest_mega.rewards.rubric import reward
from rest_mega.rewards.tool_calls import accuracy


@reward("format")
def reply_format(trajectory: Trajectory) -> float:
    """1 where the replies are written as they should be, else 0.

    Tasks with a gold reply in ToolRL's format (`task["ground_truth"]`): ToolRL's rule, which asks
    for the gold reply's parts, of the last turn. All others: every turn obeys its dialect's
    grammar.
    """
    gold = trajectory.prompt.task.get("ground_truth")
    if gold is not None:
        return toolrl.format_score(_last_text(trajectory), gold)
    return float(bool(trajectory.turns) and all(turn.well_formed for turn in trajectory.turns))


@reward("tool_calls")
def tool_calls(trajectory: Trajectory) -> float:
    """S_acc in [0, 1] of all calls of the trajectory against `task["calls"]`; 0 where the task has
    no such list.

    An empty list of gold calls says that none is wanted: 1 without calls, 0 with any, and 0 where
    a reply does not parse: a broken call is no abstention.
    """
    gold = trajectory.prompt.task.get("calls")
    if gold is None:
        return 0.0
    try:
        wanted = [ToolCall(call["name"], dict(call["arguments"])) for call in gold]
    except (KeyError, TypeError, ValueError) as error:
        where = f'prompt {trajectory.prompt.id!r}: task["calls"]={gold!r}'
        raise ConfigError(
            f'{where} must be a list of {{"name", "arguments"}}; mend the row'
        ) from error
    if not wanted and not all(turn.well_formed for turn in trajectory.turns):
        return 0.0
    return accuracy(wanted, [call for turn in trajectory.turns for call in turn.calls])


@reward("success")
def success(trajectory: Trajectory) -> float:
    """1 where the environment judged the episode a success, else 0 (also where it does not
    judge)."""
    return float(bool(trajectory.result.get("success", False)))


@reward("toolrl")
def toolrl_reward(trajectory: Trajectory) -> float:
    """ToolRL's static reward of the last turn, F + C in [-3, 4]; 0 where the task has no
    `ground_truth`."""
    gold = trajectory.prompt.task.get("ground_truth")
    if gold is None:
        return 0.0
    text = _last_text(trajectory)
    return toolrl.format_score(text, gold) + toolrl.correctness(text, gold)


def _last_text(trajectory: Trajectory) -> str:
    return trajectory.turns[-1].text if trajectory.turns else ""
