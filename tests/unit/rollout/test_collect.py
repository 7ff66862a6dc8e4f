"""Collection: an episode is its prompt, the sampled turns and the answers between them."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest

from rest_mega.config import ConfigError
from rest_mega.environments import ENVIRONMENTS, ToolEnvironment, tool
from rest_mega.records import Trajectory
from rest_mega.rollout.collect import check_prompts
from rest_mega.rollout.engine import Completion, Request, Sampling
from rest_mega.rollout.ledger import Ledger
from tests.support.rollouts import (
    CHAT,
    SEED,
    TOKENIZER,
    Counter,
    ScriptedEngine,
    assert_made_of_its_parts,
    call,
    collector,
    prompt,
    reply_ids,
)


def play(*lines: str, environment: str = "test counter", **settings: int) -> Trajectory:
    """One episode in which the policy says `lines`."""
    engine = ScriptedEngine({("p", 0): lines})
    groups = collector(engine, **settings).collect([prompt("p", environment)], 1, Sampling(), SEED)
    assert groups is not None
    assert_made_of_its_parts(groups[0][0])
    return groups[0][0]


def test_two_turns_with_a_call_between_are_laid_out_as_the_records_say() -> None:
    t = play(call(5), "5")
    parts = [
        CHAT.prompt_ids(t.prompt.messages, Counter.specs),
        reply_ids(call(5)),
        CHAT.tool_result_ids([("add", "total 5")]),
        reply_ids("5"),
    ]
    assert t.ids_T.tolist() == [i for part in parts for i in part]
    lengths = [len(part) for part in parts]
    assert t.turn_T.tolist() == np.repeat([-1, 0, -1, 1], lengths).tolist()
    assert t.mask_T.tolist() == np.repeat([False, True, False, True], lengths).tolist()
    assert t.version_T.tolist() == np.repeat([-1, 7, -1, 8], lengths).tolist()
    np.testing.assert_array_equal(t.logprobs_T[t.turn_T == 0], -np.arange(1, lengths[1] + 1) / 8)
    np.testing.assert_array_equal(t.logprobs_T[t.turn_T == 1], -np.arange(1, lengths[3] + 1) / 8)
    first, second = t.turns
    assert (first.text, first.answer, second.text, second.answer) == (call(5), "", "5", "5")
    assert [(c.name, c.arguments) for c in first.calls] == [("add", {"number": 5})]
    assert [(o.status, o.content) for o in first.outcomes] == [("ok", "total 5")]
    assert (t.stop, t.result) == ("answered", {"success": True, "answer": "5"})


def test_several_calls_of_one_turn_are_answered_in_order_and_share_a_delta() -> None:
    t = play(call(2) + "\n" + call(3) + "\n" + call('"x"'), "5")
    assert [o.status for o in t.turns[0].outcomes] == ["ok", "ok", "bad_arguments"]
    assert [o.content for o in t.turns[0].outcomes][:2] == ["total 2", "total 5"]
    assert t.result["success"]


def test_a_malformed_reply_is_answered_once_and_may_be_mended() -> None:
    t = play("<tool_call>\n{oops", call(5), "5")
    assert [turn.well_formed for turn in t.turns] == [False, True, True]
    (outcome,) = t.turns[0].outcomes
    assert outcome.status == "malformed"
    assert outcome.content in TOKENIZER.decode(t.ids_T[t.turns[0].end : t.turns[1].start].tolist())
    assert t.result["success"]


class Chatty(Counter):
    """Asks for the total of a second number once a first answer was given."""

    said: tuple[str, ...] = ()

    def next_user(self, answer: str) -> str | None:
        self.said = (*self.said, answer)
        return "Now add 4." if len(self.said) == 1 else None

    def finish(self, answer: str) -> dict[str, Any]:
        return super().finish(answer) | {"said": self.said}


ENVIRONMENTS["test chatty"] = Chatty


def chatty(*lines: str, **settings: int) -> Trajectory:
    engine = ScriptedEngine({("p", 0): lines})
    groups = collector(engine, **settings).collect(
        [prompt("p", "test chatty")], 1, Sampling(), SEED
    )
    assert groups is not None
    return groups[0][0]


def test_a_user_who_speaks_again_is_answered_in_the_same_episode() -> None:
    t = chatty(call(5), "5", call(4), "9")
    parts = [
        CHAT.prompt_ids(t.prompt.messages, Counter.specs),
        reply_ids(call(5)),
        CHAT.tool_result_ids([("add", "total 5")]),
        reply_ids("5"),
        CHAT.user_ids("Now add 4."),
        reply_ids(call(4)),
        CHAT.tool_result_ids([("add", "total 9")]),
        reply_ids("9"),
    ]
    assert t.ids_T.tolist() == [i for part in parts for i in part]
    assert t.mask_T.tolist() == np.repeat([False, True] * 4, [len(part) for part in parts]).tolist()
    assert (t.stop, t.result) == ("answered", {"success": True, "answer": "9", "said": ("5", "9")})


def test_a_user_who_speaks_again_finds_no_reply_past_the_limits() -> None:
    whole = chatty(call(5), "5", call(4), "9")
    said = {"success": False, "answer": "", "said": ("5",)}
    late = chatty(call(5), "5", call(4), max_turns=2)
    assert (late.stop, len(late.turns), late.result) == ("turn_limit", 2, said)
    full = chatty(call(5), "5", call(4), max_tokens=whole.turns[2].start)
    assert (full.stop, len(full.turns), full.result) == ("length", 2, said)
    cut = chatty(call(5), "5", max_tokens=whole.turns[1].end - 1)
    assert (cut.stop, cut.result["said"]) == ("token_limit", ())


def test_the_last_allowed_turn_gets_its_outcome_but_no_reply() -> None:
    t = play(call(1), call(2), "3", max_turns=2)
    assert t.stop == "turn_limit"
    assert [o.content for turn in t.turns for o in turn.outcomes] == ["total 1", "total 3"]
    assert t.turns[-1].end == len(t.ids_T)
    assert t.result == {"success": False, "answer": ""}


def test_a_turn_that_is_cut_off_is_neither_parsed_as_ended_nor_answered() -> None:
    long = play(call(5), "5").turns[0]
    size = long.end - long.start
    t = play(call(5), "5", max_new_tokens=size - 1)  # all but the end-of-turn token
    assert t.stop == "token_limit"
    (turn,) = t.turns
    assert (turn.ended, turn.well_formed, turn.outcomes) == (False, False, ())
    assert turn.text == call(5)
    assert t.result == {"success": False, "answer": ""}
    assert play(call(5), "5", max_new_tokens=size).stop == "answered"


def test_a_trajectory_never_outgrows_its_room() -> None:
    whole = play(call(5), "5")
    delta_end = whole.turns[1].start
    seen = set()
    for room in range(whole.turns[0].start + 1, len(whole.ids_T) + 1):
        t = play(call(5), "5", max_tokens=room)
        assert len(t.ids_T) <= room
        assert t.ids_T.tolist() == whole.ids_T[: len(t.ids_T)].tolist()
        if room < whole.turns[0].end:
            assert (t.stop, len(t.ids_T)) == ("token_limit", room)
        elif room <= delta_end:  # the answer would fit at best, but no reply to it
            assert (t.stop, len(t.ids_T)) == ("length", whole.turns[0].end)
        else:
            done = room == len(whole.ids_T)
            assert (t.stop, len(t.ids_T)) == ("answered" if done else "token_limit", room)
        seen.add(t.stop)
    assert seen == {"token_limit", "length", "answered"}


def test_no_call_is_answered_in_the_environment_none() -> None:
    for text in (call(5), "<tool_call>\n{oops"):
        t = play(text, "unsaid", environment="none")
        assert (t.stop, len(t.turns), t.turns[0].outcomes) == ("answered", 1, ())
        assert t.result == {}
    assert len(play(call(5), environment="none").turns[0].calls) == 1


def test_a_prompt_that_is_drawn_twice_is_played_by_other_siblings() -> None:
    scripts = {("a", number): [str(number)] for number in range(4)}
    both = [prompt("a"), prompt("a")]
    groups = collector(ScriptedEngine(scripts)).collect(both, 2, Sampling(), SEED, [0, 2])
    assert groups is not None
    assert [[t.turns[0].text for t in group] for group in groups] == [["0", "1"], ["2", "3"]]


def test_siblings_keep_their_places_and_their_own_environment() -> None:
    scripts = {
        ("a", 0): ["4"], ("a", 1): [call(1), call(1), "2"],
        ("b", 0): [call(9), "9"], ("b", 1): ["0"],
    }  # fmt: skip
    engine = ScriptedEngine(scripts)
    groups = collector(engine).collect([prompt("a"), prompt("b")], 2, Sampling(), SEED)
    assert groups is not None
    for name, group in zip("ab", groups, strict=True):
        for sibling, t in enumerate(group):
            assert_made_of_its_parts(t)
            assert (t.prompt.id, t.sibling) == (name, sibling)
            assert [turn.text for turn in t.turns] == scripts[name, sibling]
            assert t.result["success"] == (t.turns[-1].text != "4")
    assert len(engine.requests) == 4 + 2 + 1  # who has finished is asked no more


def test_the_tools_of_all_episodes_run_side_by_side() -> None:
    """The barrier opens only when the tools of all four siblings are inside at one time."""
    gate = threading.Barrier(4)

    class Gate(ToolEnvironment):
        @tool
        def add(self, number: int) -> str:
            """Wait for the others."""
            gate.wait(timeout=10)
            return f"total {number}"

    ENVIRONMENTS["test gate"] = Gate
    engine = ScriptedEngine({("p", g): [call(g), "done"] for g in range(4)})
    groups = collector(engine).collect([prompt("p", "test gate")], 4, Sampling(), SEED)
    assert groups is not None
    outcomes = [t.turns[0].outcomes[0] for t in groups[0]]
    assert [(o.status, o.content) for o in outcomes] == [("ok", f"total {g}") for g in range(4)]
    del ENVIRONMENTS["test gate"]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_stop_between_turns_ends_collection_without_a_result(after: int) -> None:
    engine = ScriptedEngine({("p", 0): [call(1)] * 4})
    answers = iter([False] * after + [True])
    played = collector(engine, lambda: next(answers)).collect([prompt("p")], 1, Sampling(), SEED)
    assert played is None
    assert len(engine.requests) == after


def test_prompts_are_checked_before_anything_is_sampled() -> None:
    check_prompts([prompt("fits", "none", "Hi.")], CHAT, 100)
    with pytest.raises(ConfigError, match=r"'nowhere' is not known; choose one of .*test counter"):
        check_prompts([prompt("p", "nowhere")], CHAT, 100)
    with pytest.raises(ConfigError, match=r"prompt 'long' has \d+ tokens.* 100: raise rollout\."):
        check_prompts([prompt("long", "none", "word " * 100)], CHAT, 100)


def test_a_prompt_that_leaves_no_room_for_one_token_is_refused() -> None:
    size = len(CHAT.prompt_ids(prompt("p", "none").messages))
    check_prompts([prompt("p", "none")], CHAT, size + 1)
    with pytest.raises(ConfigError, match=f"has {size} tokens, rollout.max_tokens is {size}"):
        check_prompts([prompt("p", "none")], CHAT, size)


def test_an_engine_whose_answer_is_inconsistent_is_refused() -> None:
    class Short(ScriptedEngine):
        def _complete(self, request: Request) -> Completion:
            done = super()._complete(request)
            return dataclasses.replace(done, logprobs_T=done.logprobs_T[1:])

    class Lost(ScriptedEngine):
        def generate(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
            return super().generate(requests, sampling)[1:]

    for kind, message in (
        (Short, r"2 token ids but 1 log-probs and 2 versions"),
        (Lost, "shorter"),
    ):
        engine = kind({("p", 0): ["5"]})
        with pytest.raises(ValueError, match=message):
            collector(engine).collect([prompt("p")], 1, Sampling(), SEED)


def test_a_ledger_grows_by_appending_alone() -> None:
    ledger = Ledger([4, 5])
    before = ledger.ids_T
    done = Completion(np.array([6], np.int32), np.array([-0.5], np.float32), True, np.array([3]))
    assert ledger.sample(done, 0) == (2, 3)
    ledger.observe([7, 8])
    assert before.tolist() == [4, 5]
    assert ledger.ids_T.tolist() == [4, 5, 6, 7, 8]
    assert ledger.mask_T.tolist() == [False, False, True, False, False]
    assert len(ledger) == 5
