"""Is appending to a conversation exact? Checks of one tokenizer's chat template, on a CPU.

A rollout appends: what the policy sampled is kept, and what the template writes between two turns
is put behind it (chat.py). A server that renders the whole conversation anew before each turn sends
the model the same tokens only if render(messages + turn) begins with render(messages). Where a
template breaks this, the model is trained on other tokens than it later reads.

Three grades:
    error     a rollout cannot be built with this template, or hides something from the model
    warning   a server that renders anew sends other tokens than the model was trained on
    note      exact as done here; a mistake waits for who appends in another way
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rest_mega import dialects
from rest_mega.config import ConfigError
from rest_mega.data.chat import REMEDY, REPLY, ChatFormat, tool_message
from rest_mega.records import Message

ERROR, WARNING, NOTE = "error", "warning", "note"
THOUGHT = "THOUGHT0THOUGHT"
_SYSTEM: Message = {"role": "system", "content": "Be brief."}
_USER: Message = {"role": "user", "content": "First question?"}
_NEXT: Message = {"role": "user", "content": "Second question?"}
_REPLY: Message = {"role": "assistant", "content": REPLY}
_THINKING: Message = {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\n{REPLY}"}
_RESULTS = [tool_message("weather", text) for text in ("RESULT1", "RESULT2")]
_CALL = {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}
_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
ALONE = (
    "write each turn by itself, as the shipped template does: tokenizer.chat_template=hermes where "
    "the vocabulary has <|im_end|>"
)


@dataclass(frozen=True)
class Finding:
    """One thing that is not as appending needs it."""

    grade: str
    """error, warning or note."""
    name: str
    """What broke, in a few words."""
    what: str
    """What the template writes."""
    fix: str


def lint(chat: ChatFormat, dialect: str = "hermes") -> list[Finding]:
    """All findings about a template, and about the dialect that is to read its calls; errors
    first."""
    checks: tuple[Callable[[ChatFormat], Iterator[Finding]], ...] = (
        _header,
        _end_of_turn,
        _tools_are_shown,
        _result_after_reply,
        _several_results,
        _thinking,
        _new_user_turn,
        _white_space,
        _tokens,
        lambda chat: _calls(chat, dialect),
    )
    found = [finding for check in checks for finding in _run(check, chat)]
    return sorted(dict.fromkeys(found), key=lambda f: (ERROR, WARNING, NOTE).index(f.grade))


def _run(check: Callable[[ChatFormat], Iterator[Finding]], chat: ChatFormat) -> list[Finding]:
    try:
        return list(check(chat))
    except ConfigError as error:
        what, _, fix = str(error).rpartition("; ")
        return [Finding(ERROR, "refused conversation", what or str(error), fix or REMEDY)]


# ------------------------------------------------------------------ the checks


def _header(chat: ChatFormat) -> Iterator[Finding]:
    """The header of an assistant turn is appended, and a rendered turn begins with it."""
    before, after = chat.render([_USER], header=False), chat.render([_USER], header=True)
    turn = chat.render([_USER, _REPLY], header=False)
    if not after.startswith(before) or not turn.startswith(after):
        other = before if not after.startswith(before) else turn
        yield Finding(
            WARNING,
            "generation prompt is not a prefix",
            f"with add_generation_prompt it writes {_differs(after, other)}",
            "write the same header with add_generation_prompt as before an assistant's message",
        )
    elif not turn.startswith(after + REPLY):
        between = turn[len(after) : turn.index(REPLY)] if REPLY in turn else ""
        yield Finding(
            WARNING,
            "text between header and reply",
            f"a finished turn has {between!r} between the header and what the policy said",
            f"{ALONE}; or write the text into the generation prompt too",
        )


def _end_of_turn(chat: ChatFormat) -> Iterator[Finding]:
    """A turn ends with a token that the policy can sample; what follows is the next delta's."""
    _, _, rest = chat.render([_USER, _REPLY], header=False).partition(REPLY)
    ends = [chat.tokenizer.token_bytes(i).decode() for i in chat.tokenizer.end_of_turn_ids]
    end = next((text for text in ends if rest.startswith(text)), "")
    if not end:
        yield Finding(
            ERROR,
            "no end of turn",
            f"after a reply it writes {rest[:20]!r}, none of the end-of-turn tokens "
            f"{', '.join(ends)}",
            "end an assistant's turn with one of them",
        )
    elif trailing := rest[len(end) :]:
        yield Finding(
            NOTE,
            "text after the end of turn",
            f"{trailing!r} follows {end}: the policy stops before it, so it belongs to what is "
            "appended next",
            "append ChatFormat.tool_result_ids, which begins with it; never a template's rendering "
            "of the new messages alone",
        )


def _tools_are_shown(chat: ChatFormat) -> Iterator[Finding]:
    """The model is told its tools."""
    shown = chat.render([_USER], [_TOOL], header=True)
    missing = [word for word in ("weather", "city") if word not in shown]
    if missing:
        yield Finding(
            ERROR,
            "tools are ignored",
            f"of a tool it does not write {' and '.join(map(repr, missing))}",
            REMEDY,
        )


def _result_after_reply(chat: ChatFormat) -> Iterator[Finding]:
    """A tool's result is written, behind a reply that stays as it was."""
    before = chat.render([_USER, _REPLY], header=False)
    after = chat.render([_USER, _REPLY, _RESULTS[0]], header=False)
    if "RESULT1" not in after:
        yield Finding(
            ERROR, "tool results are ignored", "it does not write a tool's result", REMEDY
        )
    elif not after.startswith(before):
        yield _changed("a tool's result", before, after)


def _several_results(chat: ChatFormat) -> Iterator[Finding]:
    """The second result of a turn is appended behind the first."""
    one = chat.render([_USER, _REPLY, _RESULTS[0]], header=False)
    two = chat.render([_USER, _REPLY, *_RESULTS], header=False)
    if "RESULT2" not in two:
        yield Finding(ERROR, "tool results are ignored", "it writes the first of two alone", REMEDY)
    elif not two.startswith(one):
        yield Finding(
            NOTE,
            "merged tool results",
            f"a second result changes how the first ends: {_differs(one, two)}",
            "append all results of a turn at once (ChatFormat.tool_result_ids does)",
        )


def _thinking(chat: ChatFormat) -> Iterator[Finding]:
    """A block of thought stays where it is while the conversation goes on."""
    before = chat.render([_USER, _THINKING], header=False)
    if THOUGHT not in before:
        what = "it drops a block of thought from the last turn already"
        yield Finding(WARNING, "stripped thinking", what, ALONE)
        return
    for message, name in ((_RESULTS[0], "a tool's result"), (_NEXT, "a new user message")):
        after = chat.render([_USER, _THINKING, message], header=False)
        if THOUGHT not in after:
            yield Finding(
                WARNING, "stripped thinking", f"{name} drops the thought of turns before it", ALONE
            )
        elif not after.startswith(before):
            yield _changed(name, before, after)


def _new_user_turn(chat: ChatFormat) -> Iterator[Finding]:
    """A new user message leaves system message and tools where they were."""
    for start in ([_USER], [_SYSTEM, _USER]):
        before = chat.render([*start, _REPLY], [_TOOL], header=False)
        after = chat.render([*start, _REPLY, _NEXT], [_TOOL], header=False)
        if not after.startswith(before):
            yield _changed("a new user message", before, after)


def _white_space(chat: ChatFormat) -> Iterator[Finding]:
    """What the policy said is written to the letter."""
    said = f"\n {REPLY} \n"
    if said not in chat.render([_USER, {**_REPLY, "content": said}, _NEXT], header=False):
        yield Finding(
            WARNING,
            "trimmed content",
            "white space around a reply is not kept",
            "remove `| trim` from the assistant's content",
        )


def _tokens(chat: ChatFormat) -> Iterator[Finding]:
    """The tokens of the parts are the tokens of the whole."""
    messages = [_USER, _REPLY, *_RESULTS, _REPLY]
    ids, _ = chat.dialogue_ids(messages)
    text = chat.render(messages, header=False)
    whole = chat.tokenizer.encode(text)
    if whole[: len(ids)] != ids and text.startswith(chat.tokenizer.decode(ids)):
        yield Finding(
            WARNING,
            "tokens across a boundary",
            "the text is the same, its tokens are not: one of them spans the end of a header and "
            "the beginning of a reply",
            "end the header with a special token or a newline that no token shares",
        )


def _calls(chat: ChatFormat, dialect: str) -> Iterator[Finding]:
    """Structured calls are written as the dialect reads them."""
    many = [{"type": "function", "id": f"call0000{n}", "function": _CALL} for n in range(2)]
    for calls in (many[:1], many):
        count = f"{len(calls)} structured call{'s' * (len(calls) > 1)}"
        try:
            text = chat.reply_text({"role": "assistant", "content": "", "tool_calls": calls})
        except ConfigError as error:
            fix = "give supervised dialogues and prompts their calls as text, as the policy does"
            yield Finding(WARNING, "structured calls refused", f"{count}: {error}", fix)
            return
        read = [d for d in dialects.DIALECTS if _reads(text, d, len(calls))]
        if dialect not in read:
            fix = f"set tokenizer.dialect={read[0]}" if read else "write the calls in the dialect"
            what = f"dialect {dialect!r} does not read {text!r}, written for {count}"
            fix += ", or change the template"
            yield Finding(WARNING, "calls in another dialect", what, fix)
            return


def _reads(text: str, dialect: str, count: int) -> bool:
    reply = dialects.parse(text.encode(), dialect)
    calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in reply.calls]
    return reply.well_formed and calls == [_CALL] * count


# ------------------------------------------------------------------ words


def _changed(what: str, before: str, after: str) -> Finding:
    """`what` was appended and `before` is no prefix any more: say which part of it changed."""
    same = _common(before, after)
    name, fix = "changed history", ALONE
    if "think" in _window(before, same):
        name = "stripped thinking"
    elif before.rstrip() == before[:same].rstrip():
        name, fix = "missing newline", "write the same white space after the last turn as between"
    elif REPLY in after[same:]:
        name, fix = "moved text", "write system message and tools once, at the beginning"
    what += f" changes what was written: {_differs(before, after)}"
    return Finding(WARNING, name, what, fix)


def _common(one: str, other: str) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _window(text: str, position: int) -> str:
    return text[max(position - 12, 0) : position + 24]


def _differs(before: str, after: str) -> str:
    same = _common(before, after)
    return f"{_window(before, same)!r} becomes {_window(after, same)!r}"


def report(findings: Sequence[Finding]) -> str:
    """The findings as text, one paragraph each."""
    if not findings:
        return "appending is exact\n"
    return "".join(f"{f.grade}: {f.name}\n  {f.what}\n  fix: {f.fix}\n" for f in findings)
