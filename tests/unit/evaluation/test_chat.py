"""Benchmarks against an OpenAI-compatible endpoint: what is sent, what is made of the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rest_mega.cli import main
from rest_mega.config import ConfigError, EndpointConfig, EnvironmentConfig, EvaluationConfig
from rest_mega.dialects import DIALECTS, parse
from rest_mega.environments import ToolRuntime
from rest_mega.evaluation.chat_play import (
    EXAMPLES,
    ChatPlayer,
    FourBytes,
    Limits,
    resolve,
    tools_as_text,
)
from rest_mega.evaluation.suite import Played, Task
from rest_mega.records import Prompt, ToolCall
from tests.support.chat_server import Answer, ChatServer, chat_server, said
from tests.support.rollouts import call, prompt

DATA = Path(__file__).parents[2] / "data" / "api_bank"
SPEC = {
    "type": "function",
    "function": {
        "name": "math.sum",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def play(
    answer: Answer, task: Task, mode: str = "tools", count: int = 1, turns: int = 4, **keys: Any
) -> tuple[dict[int, Played], list[str], ChatServer]:
    """What became of `count` samples of the task, the lost ones, and what the server saw."""
    found: dict[int, Played] = {}
    runtime = ToolRuntime(EnvironmentConfig(), FourBytes())
    with chat_server(answer) as server:
        endpoint = EndpointConfig(
            url=server.url, model="scripted", mode=mode, **{"retries": 1, **keys}
        )
        config = EvaluationConfig(endpoint=endpoint, temperature=0.5, samples=count)
        player = ChatPlayer(
            config, "hermes", Limits(turns, 77), runtime,
            lambda _, sample, played: found.__setitem__(sample, played),
        )  # fmt: skip
        player.play([(task, n) for n in range(count)])
    return found, player.lost, server


def counting(content: str = "Add 2 and 3.") -> Task:
    return Task(prompt("p", content=content), "c")


# ------------------------------------------------------------------ tools in the API's fields


def test_calls_are_answered_until_the_model_answers() -> None:
    script = [said(None, ("add", {"number": 2}), ("add", {"number": 3})), said("5")]
    found, lost, server = play(lambda body, n: (200, script[n]), counting())
    played = found[0]
    assert (played.stop, played.result["success"], lost) == ("answered", True, [])
    assert played.dialect == ""
    assert [c.arguments for c in played.turns[0].calls] == [{"number": 2}, {"number": 3}]
    assert [o.content for o in played.turns[0].outcomes] == ["total 2", "total 5"]
    first, second = server.bodies
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("scripted", 77, 0.5)
    assert first["tools"][0]["function"]["name"] == "add"
    assert first["seed"] != second["seed"]
    assert second["messages"][1]["tool_calls"] == script[0]["choices"][0]["message"]["tool_calls"]
    assert [m["tool_call_id"] for m in second["messages"][2:]] == ["call_0", "call_1"]
    assert [m["content"] for m in second["messages"][2:]] == ["total 2", "total 5"]


def test_a_name_that_the_api_does_not_take_is_sent_otherwise_and_read_back() -> None:
    task = Task(Prompt("q", ({"role": "user", "content": "1+1?"},), (SPEC,)), "c")
    found, _, server = play(lambda body, n: (200, said(None, ("math_sum", {"a": 1}))), task)
    assert server.bodies[0]["tools"][0]["function"]["name"] == "math_sum"
    assert found[0].turns[0].calls == (ToolCall("math.sum", {"a": 1}),)


@pytest.mark.parametrize(
    "answer",
    [
        said(None, ("add", "{oh")),
        said(None, ("add", "[1]")),
        said(None, ("add", "[" * 9000)),
        {"choices": [{"message": {"tool_calls": "x"}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"tool_calls": [{"id": 1}]}, "finish_reason": "stop"}]},
        said(None, ("fly", {"to": "Mars"})),
        said(None, ("add", {"number": "many"})),
    ],
)
def test_calls_that_are_none_are_answered_as_in_training(answer: Any) -> None:
    found, lost, _ = play(lambda b, n: (200, answer if n == 0 else said("0")), counting())
    assert lost == []
    assert found[0].turns[0].outcomes[0].status in ("malformed", "unknown_tool", "bad_arguments")
    assert found[0].result["success"]


@pytest.mark.parametrize(
    ("message", "text"),
    [({"content": None}, ""), ({"content": [1]}, ""), ({"content": "\ud800"}, "\ud800"), ({}, "")],
)
def test_whatever_is_said_is_an_answer(message: dict[str, Any], text: str) -> None:
    answer = {"choices": [{"message": message, "finish_reason": "stop"}]}
    found, lost, _ = play(lambda body, n: (200, answer), counting())
    assert lost == []
    assert (found[0].stop, found[0].turns[0].text) == ("answered", text)


def test_a_model_that_never_stops_reaches_a_limit() -> None:
    endless = said(None, ("add", {"number": 1}))
    found, _, server = play(lambda body, n: (200, endless), counting(), turns=3)
    assert (found[0].stop, len(found[0].turns), len(server.bodies)) == ("turn_limit", 3, 3)
    cut = said("on and on", reason="length")
    found, _, _ = play(lambda body, n: (200, cut), counting())
    assert (found[0].stop, found[0].turns[0].ended) == ("token_limit", False)


# ------------------------------------------------------------------ tools in the text


def test_in_text_mode_tools_stand_in_the_system_message_and_calls_in_the_text() -> None:
    script = [call(5), "5"]
    found, _, server = play(lambda body, n: (200, said(script[n])), counting(), mode="text")
    assert (found[0].stop, found[0].result["success"]) == ("answered", True)
    assert found[0].dialect == "hermes"
    assert [turn.text for turn in found[0].turns] == script
    system, *rest = server.bodies[1]["messages"]
    assert (system["role"], "tools" in server.bodies[0]) == ("system", False)
    assert '"name": "add"' in system["content"]
    assert [m["role"] for m in rest] == ["user", "assistant", "user"]
    assert rest[-1]["content"] == "<tool_response>\ntotal 5\n</tool_response>"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_form_that_a_model_is_told_is_the_one_that_is_read(dialect: str) -> None:
    reply = parse(EXAMPLES[dialect].encode(), dialect)
    assert reply.calls == (ToolCall("function", {"argument": "value"}),)
    assert EXAMPLES[dialect] in tools_as_text([SPEC], dialect)


# ------------------------------------------------------------------ what goes wrong


def test_a_busy_server_is_asked_again_and_a_broken_request_is_not() -> None:
    statuses = iter([429, 200])
    found, lost, server = play(lambda body, n: (next(statuses), said("0")), counting())
    assert (len(server.bodies), lost, found[0].stop) == (2, [], "answered")
    found, lost, server = play(lambda body, n: (500, "out of memory"), counting())
    assert (found, len(server.bodies)) == ({}, 1)
    assert "500: out of memory" in lost[0]


def test_a_server_that_says_nothing_meets_the_deadline() -> None:
    found, lost, _ = play(lambda b, n: (200, None), counting(), request_timeout_s=0.3)
    assert found == {}
    assert "no answer within 0.3 s" in lost[0]


def test_nobody_there_is_said_after_the_tries() -> None:
    config = EvaluationConfig(endpoint=EndpointConfig(url="http://127.0.0.1:9/v1", retries=1))
    with pytest.raises(ConfigError, match=r"no connection.*2 tries.*start the server"):
        resolve(config)


def test_a_conversation_beyond_the_context_is_a_wrong_answer() -> None:
    complaint = {"error": {"message": "maximum context length is 8192 tokens"}}
    found, lost, _ = play(lambda body, n: (400, complaint), counting())
    assert (found[0].stop, found[0].turns, lost) == ("prompt_length", (), [])
    assert "8192" in found[0].note
    found, lost, _ = play(lambda body, n: (400, {"error": "no such parameter"}), counting())
    assert (found, len(lost)) == ({}, 1)


def test_a_refusal_ends_the_evaluation_and_does_not_tell_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with pytest.raises(ConfigError, match=r"401.*\(key\).*MY_KEY") as caught:
        play(lambda b, n: (401, "wrong key sk-secret"), counting(), key_variable="MY_KEY")
    assert "sk-secret" not in str(caught.value)
    _, _, server = play(lambda b, n: (200, said("0")), counting(), key_variable="MY_KEY")
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"


def test_a_redirect_is_not_followed() -> None:
    with pytest.raises(ConfigError, match="answered 307"):
        play(lambda body, n: (307, "elsewhere"), counting())


def test_a_server_that_loses_everything_is_soon_left_alone() -> None:
    _, lost, server = play(lambda b, n: (500, "broken"), counting(), count=40, in_flight=1)
    assert len(lost) == 40
    assert len(server.bodies) == 8


@pytest.mark.parametrize("models", [(), ("a", "b")])
def test_the_model_is_named_where_there_are_several(models: tuple[str, ...]) -> None:
    def nothing(body: dict[str, Any], number: int) -> tuple[int, Any]:
        raise AssertionError(body)

    with (
        chat_server(nothing, models) as server,
        pytest.raises(ConfigError, match=rf"serves {len(models)} models"),
    ):
        resolve(EvaluationConfig(endpoint=EndpointConfig(url=server.url)))
    with chat_server(nothing) as server:
        named = resolve(EvaluationConfig(endpoint=EndpointConfig(url=server.url)))
    assert named.endpoint.model == "scripted"


def test_four_bytes_are_a_token() -> None:
    assert len(FourBytes().encode("a" * 9)) == 3
    assert FourBytes().decode(FourBytes().encode("böser Text!!")) == "böser Text!!   "


# ------------------------------------------------------------------ the command line


def right(body: dict[str, Any]) -> str:
    """The gold reply to the made-up row whose prompt this is."""
    for file in DATA.glob("*.json"):
        for row in json.loads(file.read_text("utf-8")):
            if [row["system"], row["user"]] == [m["content"] for m in body["messages"]]:
                gold = row["answer"] if isinstance(row["answer"], dict) else row["answer"][0]
                return f"<think> so </think>\n<tool_call>\n{json.dumps(gold)}\n</tool_call>"
    raise AssertionError(body)


def test_an_endpoint_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lost samples are drawn by the next call, the others are not asked for again."""
    words = ["eval", "--suite", "api-bank", "--data", str(DATA), "--out", str(tmp_path / "out")]

    def flaky(body: dict[str, Any], number: int) -> tuple[int, Any]:
        return (500, "oh") if number in (2, 5) else (200, said(right(body)))

    with chat_server(flaky) as server:
        assert main([*words, server.url, "evaluation.endpoint.in_flight=1"]) == 1
        assert "2 of 8 samples are not done" in capsys.readouterr().err
        assert main([*words, server.url]) == 0
        assert len(server.bodies) == 8 + 2
    assert "strict overall  100.0" in capsys.readouterr().out
    assert "tools" not in server.bodies[0]
    rows = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len({row["task"] for row in rows}) == 8
