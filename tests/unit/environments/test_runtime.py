"""The runtime: calls side by side, retries, budgets, messages, limits in tokens, and the tools that
a row selects."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_mega.config import ConfigError, EnvironmentConfig
from rest_mega.environments import (
    ENVIRONMENTS,
    ToolEnvironment,
    ToolError,
    TransientToolError,
    tool,
)
from rest_mega.environments.deadline import DeadlineError, remaining, together, uncounted, within
from rest_mega.environments.results import cut_tokens
from rest_mega.records import Prompt
from rest_mega.rollout.collect import check_prompts
from tests.support.calls import outcomes, reply_of, row, runtime
from tests.support.rollouts import CHAT, TOKENIZER


class Clock(ToolEnvironment):
    """Tools that tell when they ran, and with whom."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        super().__init__(task)
        self.together = self.most = self.tries = 0
        self.lock = threading.Lock()
        self.log: list[str] = []
        self.meeting = threading.Barrier(task.get("guests", 1))

    @tool(concurrent=True)
    def meet(self, name: str) -> str:
        """Return when all guests have come."""
        with self.lock:
            self.together += 1
            self.most = max(self.most, self.together)
        self.meeting.wait(timeout=10)
        with self.lock:
            self.together -= 1
            self.log.append("meet")
        return name

    @tool
    def note(self, text: str) -> str:
        """Write down, in order."""
        self.log.append(text)
        return " ".join(self.log)

    @tool(idempotent=True)
    def flaky(self, good_try: int, how: str) -> str:
        """Fail until the good try."""
        self.tries += 1
        if self.tries < good_try:
            raise {"busy": TransientToolError, "never": ToolError, "crash": OSError}[how]("away")
        return f"try {self.tries}"

    @tool
    def once(self) -> str:
        """Fail; not idempotent."""
        self.tries += 1
        raise TransientToolError("away")

    @tool
    def sleep(self, seconds: float) -> str:
        """Sleep."""
        time.sleep(seconds)
        return "slept"

    @tool
    def recurse(self) -> int:
        """Call itself for ever."""
        return self.recurse() + 1

    def finish(self, answer: str) -> dict[str, Any]:
        """Tell what was observed."""
        return {"most": self.most, "tries": self.tries, "log": self.log}


ENVIRONMENTS.setdefault("test clock", Clock)


def test_concurrent_calls_meet_each_other_up_to_the_cap_and_keep_their_order() -> None:
    """The barrier opens only for three at once; six calls under a cap of three pass it twice."""
    mine = runtime(parallel_calls=3)
    episode = mine.open(row("test clock", guests=3))

    done = episode.answer(reply_of(*[("meet", {"name": str(n)}) for n in range(6)]))
    assert [(o.status, o.content) for o in done] == [("ok", str(n)) for n in range(6)]
    assert episode.finish("")["most"] == 3


def test_a_call_that_is_not_concurrent_sees_exactly_the_calls_before_it() -> None:
    meet = ("meet", {"name": "x"})
    done = outcomes(
        row("test clock", guests=2),
        *[("note", {"text": "a"}), meet, meet, ("note", {"text": "b"}), ("note", {"text": "c"})],
    )
    assert [o.content for o in done] == ["a", "x", "x", "a meet meet b", "a meet meet b c"]


@pytest.mark.parametrize(
    ("how", "good_try", "content", "tries"),
    [
        ("busy", 3, "try 3", 3),
        ("crash", 3, "try 3", 3),
        ("busy", 4, "error: away", 3),  # two retries, then what the last try said
        ("crash", 4, "error: OSError: away", 3),
        ("never", 2, "error: away", 1),  # a refusal stays a refusal
    ],
)
def test_idempotent_calls_are_retried_where_the_call_is_not_to_blame(
    how: str, good_try: int, content: str, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rest_mega.environments.calls.FIRST_PAUSE_S", 0.001)
    episode = runtime(retries=2).open(row("test clock"))

    (done,) = episode.answer(reply_of(("flaky", {"good_try": good_try, "how": how})))
    assert (done.content, episode.finish("")["tries"]) == (content, tries)


def test_other_calls_are_never_run_twice() -> None:
    episode = runtime(retries=2).open(row("test clock"))

    (done,) = episode.answer(reply_of(("once", {})))
    assert (done.content, episode.finish("")["tries"]) == ("error: away", 1)


def test_an_episode_whose_seconds_are_spent_gets_answers_without_running_anything() -> None:
    mine = runtime(episode_timeout_s=0.2, call_timeout_s=10.0)
    episode = mine.open(row("test clock"))

    turn = reply_of(("sleep", {"seconds": 60.0}), ("note", {"text": "a"}))
    done = episode.answer(turn)
    assert [o.status for o in done] == ["timeout", "timeout"]
    assert done[1].content == "error: the 0.2 s for tools are spent"
    assert episode.finish("")["log"] == []
    (other,) = mine.open(row("test clock")).answer(reply_of(("note", {"text": "b"})))
    assert other.content == "b"  # another episode has a budget of its own


def test_a_verdict_that_hangs_stops_the_run_and_says_whose_it_is() -> None:
    class Undecided(ToolEnvironment):
        def finish(self, answer: str) -> dict[str, Any]:
            """Never."""
            time.sleep(60)
            return {}

        def next_user(self, answer: str) -> str | None:
            """Never."""
            time.sleep(60)
            return None

    ENVIRONMENTS["test undecided"] = Undecided
    episode = runtime(call_timeout_s=0.05).open(row("test undecided"))
    for what, method in (("judge", episode.finish), ("go on with", episode.next_user)):
        with pytest.raises(
            RuntimeError, match=rf"'test undecided' did not {what} prompt 'p' within 0\.05"
        ):
            method("")
    del ENVIRONMENTS["test undecided"]


def test_a_users_next_message_may_offer_tools_that_could_not_be_called_before() -> None:
    class Late(ToolEnvironment):
        def __init__(self, task: Mapping[str, Any]) -> None:
            super().__init__(task)
            self.specs = ()  # type: ignore[misc]

        @tool
        def late(self) -> str:
            """Offered by the second message."""
            return "here"

        def next_user(self, answer: str) -> str | None:
            self.specs = Late.specs  # type: ignore[misc]
            return f"{answer}? There is `late` now."

    ENVIRONMENTS["test late"] = Late
    episode = runtime().open(row("test late"))
    (before,) = episode.answer(reply_of(("late", {})))
    assert episode.next_user("what") == "what? There is `late` now."
    (after,) = episode.answer(reply_of(("late", {})))
    assert (before.status, after.status, after.content) == ("unknown_tool", "ok", "here")
    del ENVIRONMENTS["test late"]


def test_endless_recursion_in_this_process_is_an_error() -> None:
    (done,) = outcomes(row("test clock"), ("recurse", {}))
    assert done.status == "error"
    assert done.content.startswith("error: RecursionError")


def test_what_the_model_reads_of_a_failure_is_configurable_by_status() -> None:
    messages = {
        "unknown_tool": "There is no {tool}.",
        "timeout": "{tool} is slow: {why}",
        "refused": "Too many calls {{not run}}.",
        "bad_arguments": "Mend this: {why}",
    }
    done = outcomes(
        row("test clock"),
        *[("nosuch", {}), ("sleep", {"seconds": 9.0}), ("note", {}), ("once", {}), ("note", {})],
        messages=messages,
        call_timeout_s=0.05,
        calls_per_turn=4,
    )
    assert [o.content for o in done] == [
        "There is no nosuch.",
        "sleep is slow: no result within 0.05 s",
        "Mend this: text is missing",
        "error: away",
        "Too many calls {not run}.",
    ]


def test_messages_that_cannot_be_filled_in_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"environment\.messages' ?='?slow|'slow' is not known"):
        EnvironmentConfig(messages={"slow": "x"})
    for text in ("{reason}", "{why", "{}", "{why.x}"):
        with pytest.raises(ConfigError, match=r"messages\.timeout=.*cannot be filled in"):
            EnvironmentConfig(messages={"timeout": text})


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.integers(1, 40),
    st.integers(1, 30),
)
def test_a_result_has_at_most_its_tokens_and_is_whole_where_it_fits(
    text: str, repeats: int, most: int
) -> None:
    """Independent reference: the tokenizer's own count of what is shown."""
    whole = text * repeats
    limits = EnvironmentConfig(result_tokens=most, result_characters=500)
    shown = cut_tokens(limits, TOKENIZER)(whole)
    assert len(TOKENIZER.encode(shown)) <= most
    if len(whole) <= 500 and len(TOKENIZER.encode(whole)) <= most:
        assert shown == whole
    elif shown.endswith(" characters]") and not whole.endswith(" characters]"):
        head, _, note = shown.rpartition("... [")
        assert whole.startswith(head)
        assert note in (f"{len(whole)} characters]", "500 characters]")


def test_10_mb_of_output_of_this_process_become_the_tokens_that_are_allowed() -> None:
    shown = cut_tokens(EnvironmentConfig(result_tokens=50), TOKENIZER)("word " * 2_000_000)
    assert 40 < len(TOKENIZER.encode(shown)) <= 50
    assert shown.endswith("... [10000000 characters]")


# ------------------------------------------------------------------ what a row selects

ENDPOINT = {"url": "http://127.0.0.1:9/", "description": "Look up."}


def names(prompt: Prompt, **limits: Any) -> list[str]:
    return [spec["function"]["name"] for spec in runtime(**limits).open(prompt).specs]


def declared(**limits: Any) -> dict[str, Any]:
    from rest_mega.config import RunConfig

    tree = {"environment": {"http": {"search": ENDPOINT, "fetch": ENDPOINT}, **limits}}
    return {"http": RunConfig.from_dict(tree).environment.http}


def test_a_row_shows_and_allows_the_tools_that_it_names() -> None:
    assert names(row("test clock", "note", "sleep")) == ["note", "sleep"]
    done = outcomes(row("test clock", "note"), ("note", {"text": "a"}), ("once", {}))
    assert [o.content for o in done] == ["a", "error: no tool 'once'; known: note"]


def test_a_row_may_add_declared_tools_and_the_environment_tools_has_them_all() -> None:
    assert names(row("test clock", "note", "search"), **declared()) == ["note", "search"]
    assert names(row("tools"), **declared()) == ["search", "fetch"]
    assert names(row("tools", "fetch"), **declared()) == ["fetch"]
    assert "search" not in names(row("test clock"), **declared())


def test_a_whole_spec_is_shown_as_the_row_writes_it() -> None:
    spec = {
        "type": "function",
        "function": {
            "name": "note",
            "description": "Nota.",
            "parameters": {"type": "object", "properties": {"text": {"enum": ["a"]}}},
        },
    }
    episode = runtime().open(row("test clock", spec))
    assert episode.specs == (spec,)
    done = outcomes(row("test clock", spec), ("note", {"text": "b"}), ("note", {"text": "a"}))
    assert [o.status for o in done] == ["bad_arguments", "ok"]


def test_a_row_that_names_an_unknown_tool_is_refused_at_start_with_the_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"prompt 'p': tool 'nots' is neither.*known: note"):
        check_prompts([row("test clock", "nots")], CHAT, 1000)
    bad = {
        "name": "note",
        "parameters": {"type": "object", "properties": {"text": {"type": "str"}}},
    }
    with pytest.raises(ConfigError, match=r"parameters of 'note'\.text\.type='str' is not known"):
        check_prompts([row("test clock", {"type": "function", "function": bad})], CHAT, 1000)
    spec = {"type": "function", "function": {"name": "gold_only", "parameters": {}}}
    check_prompts([row("none", spec)], CHAT, 1000)  # the environment "none" only shows


# ------------------------------------------------------------------ deadlines


def test_time_off_the_clock_does_not_count_and_time_on_it_does() -> None:
    def patient() -> float:
        with uncounted():
            time.sleep(0.15)
        return remaining()

    assert 0 < within(0.1, patient) <= 0.1
    with pytest.raises(DeadlineError):
        within(0.05, lambda: time.sleep(5))
    assert remaining() == float("inf")


def test_jobs_together_return_in_order_and_raise_when_all_are_done() -> None:
    done: list[int] = []

    def job(number: int) -> int:
        done.append(number)
        if number == 1:
            raise KeyError(number)
        return number

    assert together([lambda n=n: n * n for n in range(20)], 4) == [n * n for n in range(20)]
    with pytest.raises(KeyError):
        together([lambda n=n: job(n) for n in range(9)], 3)
    assert sorted(done) == list(range(9))
