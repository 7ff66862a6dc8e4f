"""Chat formats: a dialogue grown by deltas is, token for token, the tokenised rendering of the
whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rest_mega.config import ConfigError
from rest_mega.data.chat import ChatFormat
from rest_mega.data.tokenizer import LoadedTokenizer, Tokenizer, load_tokenizer

DATA = Path(__file__).parents[2] / "data"
NAMES = ["tiny_bpe", "tiny_sentencepiece"]
TOKENIZERS = {name: load_tokenizer(DATA / name, "hermes") for name in NAMES}
HERMES = {name: ChatFormat(tokenizer) for name, tokenizer in TOKENIZERS.items()}
PARAMETERS = {"type": "object", "properties": {"città": {"type": "string"}}, "required": ["città"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "<now>", "parameters": PARAMETERS},
    }
]

# A reply that begins or a text that ends with white space may share a token with the header's
# newline.
REPLY = st.text(
    st.characters(exclude_categories=["Cs", "Z", "Cc"]) | st.sampled_from(" \n"), min_size=1
)
REPLY = REPLY.filter(
    lambda text: not text[0].isspace() and "\u2581" not in text and "<" not in text
)
TURNS = st.lists(st.tuples(REPLY, st.lists(REPLY, min_size=1, max_size=3)), max_size=3)


def transformers_text(
    template: str, messages: list[dict[str, Any]], tools: list[Any], header: bool
) -> str:
    """The rendering by transformers' own tokenizer class."""
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(DATA / "tiny_bpe")
    reference.chat_template = template
    return str(
        reference.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=header, tokenize=False
        )
    )


def dialogue(turns: list[tuple[str, list[str]]], last: str) -> list[dict[str, Any]]:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Zürich?"},
    ]
    for reply, results in turns:
        messages.append({"role": "assistant", "content": reply})
        messages += [
            {"role": "tool", "name": "get_weather", "content": result} for result in results
        ]
    return [*messages, {"role": "assistant", "content": last}]


def stands_alone(tokenizer: Tokenizer, reply: str) -> bool:
    """No token of the rendering joins the header's newline and the reply's first character."""
    header = tokenizer.encode("<|im_start|>\n")
    alone = tokenizer.encode("<|im_start|>" + reply)[1:]
    return tokenizer.encode("<|im_start|>\n" + reply) == header + alone


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(turns=TURNS, last=REPLY, tools=st.sampled_from([[], TOOLS]))
def test_a_dialogue_grown_by_deltas_equals_the_tokenised_rendering(
    name: str, turns: list[tuple[str, list[str]]], last: str, tools: list[Any]
) -> None:
    tokenizer, chat, messages = TOKENIZERS[name], HERMES[name], dialogue(turns, last)
    assume(all(stands_alone(tokenizer, reply) for reply in [*(t[0] for t in turns), last]))
    whole = transformers_text(tokenizer.chat_template, messages, tools, header=False)
    assert whole.endswith("<|im_end|>\n")
    ids, mask = chat.dialogue_ids(messages, tools)
    assert ids == tokenizer.encode(whole.removesuffix("\n"))
    trained = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(trained) == "".join(
        f"{reply}<|im_end|>" for reply in [*(t[0] for t in turns), last]
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_rollout_builds_the_same_ids_as_a_supervised_dialogue(name: str) -> None:
    tokenizer, chat = TOKENIZERS[name], HERMES[name]
    messages = dialogue([("call one", ["sunny", '{"rain": 3}'])], "It is sunny.")
    end = tokenizer.encode("<|im_end|>")
    ids = chat.prompt_ids(messages[:2], TOOLS)
    ids += tokenizer.encode("<|im_end|>call one")[1:] + end
    ids += chat.tool_result_ids([("get_weather", "sunny"), ("get_weather", '{"rain": 3}')])
    ids += tokenizer.encode("<|im_end|>It is sunny.")[1:] + end
    assert chat.dialogue_ids(messages, TOOLS)[0] == ids


@pytest.mark.parametrize("name", NAMES)
def test_a_user_who_speaks_again_reads_as_in_the_whole_rendering(name: str) -> None:
    tokenizer, chat = TOKENIZERS[name], HERMES[name]
    messages = [
        {"role": "user", "content": "And Oslo?"},
        {"role": "assistant", "content": "It rains."},
        {"role": "user", "content": "Bergen, <|im_start|> too?"},
    ]
    whole = transformers_text(tokenizer.chat_template, messages, [], header=True)
    end = tokenizer.encode("<|im_end|>")
    ids = chat.prompt_ids(messages[:1]) + tokenizer.encode("<|im_end|>It rains.")[1:] + end
    assert ids + chat.user_ids("Bergen, <|im_start|> too?") == tokenizer.encode(whole)


def test_the_hermes_prompt_reads_as_qwens_own() -> None:
    ids = HERMES["tiny_bpe"].prompt_ids(
        [{"role": "system", "content": "Hi."}, {"role": "user", "content": "Go"}], TOOLS
    )
    assert TOKENIZERS["tiny_bpe"].decode(ids) == (
        "<|im_start|>system\nHi.\n\n# Tools\n\nYou may call one or more functions to assist with "
        "the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f"{json.dumps(TOOLS[0], ensure_ascii=False)}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
        "<args-json-object>}\n</tool_call><|im_end|>\n"
        "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n"
    )


def test_results_of_one_turn_share_a_user_turn() -> None:
    ids = HERMES["tiny_bpe"].tool_result_ids([("a", "REPLY0REPLY"), ("b", "{}")])
    assert TOKENIZERS["tiny_bpe"].decode(ids) == (
        "\n<|im_start|>user\n<tool_response>\nREPLY0REPLY\n</tool_response>\n<tool_response>\n{}\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("content", "head"), [(None, ""), ("", ""), ("Let me see.", "Let me see.\n")]
)
def test_structured_calls_become_hermes_text(content: str | None, head: str) -> None:
    functions = [
        {"name": "f", "arguments": {"città": "Zürich"}},
        {"name": "g", "arguments": '{"n": 1}'},
    ]
    calls = [{"type": "function", "id": str(n), "function": f} for n, f in enumerate(functions)]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": content, "tool_calls": calls},
    ]
    ids, mask = HERMES["tiny_bpe"].dialogue_ids(messages)
    assert TOKENIZERS["tiny_bpe"].decode([i for i, m in zip(ids, mask, strict=True) if m]) == (
        f'{head}<tool_call>\n{{"name": "f", "arguments": {{"città": "Zürich"}}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"n": 1}}\n</tool_call><|im_end|>'
    )
    assert TOKENIZERS["tiny_bpe"].decode(ids) + "\n" == transformers_text(
        TOKENIZERS["tiny_bpe"].chat_template,
        [messages[0], {**messages[1], "content": content or ""}],
        [],
        header=False,
    )


def with_template(template: str) -> ChatFormat:
    tokenizer = TOKENIZERS["tiny_bpe"]
    assert isinstance(tokenizer, LoadedTokenizer)
    return ChatFormat(dataclasses.replace(tokenizer, chat_template=template))


BARE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
)
NO_TOOL_ROLE = BARE.replace(
    "{{ '", "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{{ '", 1
)
SILENT = (
    "{% for m in messages if m.role != 'tool' %}"
    "{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
)


def test_a_template_that_cannot_do_it_is_named_with_its_remedy() -> None:
    user, reply = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    with pytest.raises(ConfigError, match=r"ignores `tools`.*tokenizer\.chat_template=hermes"):
        with_template(BARE).prompt_ids([user], TOOLS)
    with pytest.raises(
        ConfigError, match=r"refuses the roles user, assistant, tool: no tools here.*hermes"
    ):
        with_template(NO_TOOL_ROLE).tool_result_ids([("f", "1")])
    with pytest.raises(ConfigError, match="does not write tool results"):
        with_template(SILENT).tool_result_ids([("f", "1")])
    with pytest.raises(
        ConfigError, match=r"'</eot>' ?,? which is none of the tokenizer's end-of-turn tokens"
    ):
        with_template(BARE.replace("<|im_end|>", "</eot>")).dialogue_ids([user, reply])
    with pytest.raises(ConfigError, match="drops the text of an assistant turn"):
        with_template("{{ messages[0].content }}").dialogue_ids([user, reply])
    with pytest.raises(ConfigError, match="no chat template"):
        ChatFormat(load_tokenizer(DATA / "tiny_bpe"))


def test_a_template_without_tool_role_still_does_dialogues_without_tools() -> None:
    ids, _ = with_template(NO_TOOL_ROLE).dialogue_ids(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    assert TOKENIZERS["tiny_bpe"].decode(ids) == "<|im_start|>user\na<|im_end|>b<|im_end|>"


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        (["user"], "end with"),
        (["assistant"], "not begin"),
        (["user", "assistant", "assistant"], "adjacent"),
    ],
)
def test_dialogues_of_the_wrong_shape_are_refused(roles: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        HERMES["tiny_bpe"].dialogue_ids([{"role": role, "content": "x"} for role in roles])
