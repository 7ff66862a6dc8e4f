"""Messages, tool results and whole dialogues -> token ids, by the tokenizer's own Jinja chat
template.

A dialogue grows by appending: what the policy sampled is never rendered again. A turn ends with an
end-of-turn token, and what the template writes between that token and the next sampled one (tool
results, headers) is the *delta*, cut out of a rendering of a dummy dialogue:

    <system+user prompt, header> | <reply><end> | <tool result, header> | <reply><end>
             prompt_ids          |   sampled    |   tool_result_ids     |   sampled

A user's next message is appended in the same way (user_ids).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from rest_mega.config import ConfigError, require
from rest_mega.data.tokenizer import Tokenizer
from rest_mega.records import Message

REPLY, RESULT = "REPLY0REPLY", "RESULT0RESULT"
"""Stand-ins that are looked for in a rendering; the first occurrence counts, so no content can
shift a cut."""
REMEDY = "set tokenizer.chat_template=hermes, or to a Jinja file of your own"


class ChatFormat:
    """One tokenizer's way of writing a conversation."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ConfigError where the tokenizer has no chat template."""
        require(bool(tokenizer.chat_template), f"the tokenizer has no chat template; {REMEDY}")
        self.tokenizer = tokenizer

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Ids of a conversation up to the first token of the next assistant turn.

        Raises ConfigError where the template refuses the messages or hides the tools from the
        model.
        """
        require(
            not tools or self._shows_tools,
            f"the chat template ignores `tools`: the model is not told; {REMEDY}",
        )
        return self.tokenizer.encode(self.render(messages, tools, header=True))

    def tool_result_ids(self, results: Sequence[tuple[str, str]]) -> list[int]:
        """Ids between an assistant turn's end-of-turn token and the next assistant turn's first
        token.

        `results`: (tool name, content) of every call, in order; control tokens written in a content
        are broken up. Raises ConfigError where the template has no tool role.
        """
        return self._delta([tool_message(name, content) for name, content in results])

    def user_ids(self, content: str) -> list[int]:
        """Ids between an assistant turn's end-of-turn token and the next assistant turn's first
        token where the user says `content` between them."""
        return self._delta([{"role": "user", "content": content}])

    def dialogue_ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[list[int], list[bool]]:
        """A whole dialogue token for token as a rollout would have built it, and which tokens to
        train.

        The mask is True on assistant replies (but those of OpenAI's `weight` 0) and their
        end-of-turn tokens; each reply is tokenised on its own, as if sampled. The last message must
        be the assistant's, and no two of its messages adjacent. Raises ValueError otherwise.
        """
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        _check_turns(messages, turns)
        ids = self.prompt_ids(messages[: turns[0]], tools)
        mask = [False] * len(ids)
        for turn, previous in zip(turns, [None, *turns], strict=False):
            between = [] if previous is None else self._delta(messages[previous + 1 : turn])
            reply = [*self._after_end(self.reply_text(messages[turn])), self._end_id]
            ids += between + reply
            trained = messages[turn].get("weight", 1) != 0
            mask += [False] * len(between) + [trained] * len(reply)
        return ids, mask

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, header: bool
    ) -> str:
        """The template's text of a conversation; `header`: and of the next assistant turn's begin.

        Raises ConfigError where the template refuses the messages.
        """
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils

        render: Any = (
            chat_template_utils.render_jinja_template
        )  # its annotations contradict its documentation
        # A content of null (OpenAI's form of a reply that only calls tools) breaks templates that
        # concatenate.
        plain = [{**m, "content": m.get("content") or ""} for m in messages]
        try:
            rendered, _ = render(
                conversations=[plain],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.tokenizer.chat_template,
                add_generation_prompt=header,
                **self.tokenizer.special_tokens,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(str(m["role"]) for m in messages)
            raise ConfigError(
                f"the chat template refuses the roles {roles}: {error}; {REMEDY}"
            ) from error
        return str(rendered[0])

    def _after_reply(self, messages: Sequence[Message], *, header: bool, **reply: Any) -> str:
        """What the template writes after the text of a reply that `messages` follow."""
        dummy = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY, **reply}]
        _, found, rest = self.render([*dummy, *messages], header=header).partition(REPLY)
        require(bool(found), f"the chat template drops the text of an assistant turn; {REMEDY}")
        return rest

    def _delta(self, messages: Sequence[Message]) -> list[int]:
        tools = any(m["role"] == "tool" for m in messages)
        require(
            not tools or self._shows_results,
            f"the chat template does not write tool results; {REMEDY}",
        )
        rest = self._after_reply([self._as_plain(m) for m in messages], header=True)
        require(
            rest.startswith(self._end_text),
            f"after a reply amid a dialogue the chat template writes {rest[:20]!r}, not "
            f"{self._end_text!r}; {REMEDY}",
        )
        return self._after_end(rest[len(self._end_text) :])

    def _as_plain(self, message: Message) -> Message:
        """A tool's message whose text cannot end its turn or open another: control tokens written
        in it are broken up by a space."""
        if message["role"] != "tool":
            return message
        content = str(message.get("content") or "")
        for text in self.tokenizer.control_texts:
            content = content.replace(text, f"{text[:1]} {text[1:]}")
        return {**message, "content": content}

    def _after_end(self, text: str) -> list[int]:
        """Ids of `text` where it follows an end-of-turn token: tokenizers treat the start of a text
        otherwise."""
        ids = self.tokenizer.encode(self._end_text + text)
        assert ids[0] == self._end_id, (ids[0], self._end_id)
        return ids[1:]

    def reply_text(self, message: Message) -> str:
        """The reply's raw text: its content, then its structured calls as the template writes them.

        Raises ConfigError where the template has no way of writing both.
        """
        content, calls = str(message.get("content") or ""), message.get("tool_calls")
        if not calls:
            return content
        user: Message = {"role": "user", "content": "?"}
        reply = {"role": "assistant", "content": REPLY, "tool_calls": calls}
        whole = self.render([user, reply], header=False)
        name = str(calls[0].get("function", calls[0]).get("name"))
        require(name in whole, f"the chat template does not write the calls of a turn; {REMEDY}")
        if REPLY in whole:
            rest = self._after_reply((), header=False, tool_calls=calls)
            text = rest[: rest.rindex(self._end_text)]
            return content + text if content else text.lstrip()
        # Llama 3, Hermes 2 and Mistral write the calls instead of the content.
        require(
            not content, f"the chat template drops the text of a turn that calls tools; {REMEDY}"
        )
        before = self.render([user], header=True)
        whole = self.render([user, {**reply, "content": ""}], header=False)
        require(
            whole.startswith(before),
            f"a turn that calls tools does not begin with the generation prompt; {REMEDY}",
        )
        return whole[len(before) : whole.rindex(self._end_text)]

    @cached_property
    def _end_id(self) -> int:
        """The end-of-turn token that the template writes after a reply."""
        rest = self._after_reply((), header=False)
        texts = {self.tokenizer.token_bytes(i).decode(): i for i in self.tokenizer.end_of_turn_ids}
        ends = [i for text, i in texts.items() if rest.startswith(text)]
        require(
            len(ends) > 0,
            f"after a reply the chat template writes {rest[:20]!r}, which is none of the "
            "tokenizer's end-of-turn "
            f"tokens {', '.join(texts)}; set tokenizer.chat_template to a Jinja file that ends a "
            "turn with one of them",
        )
        return ends[0]

    @cached_property
    def _end_text(self) -> str:
        return self.tokenizer.token_bytes(self._end_id).decode()

    @cached_property
    def _shows_tools(self) -> bool:
        tool = {
            "type": "function",
            "function": {"name": RESULT, "description": "", "parameters": {}},
        }
        return RESULT in self.render([{"role": "user", "content": "?"}], [tool], header=True)

    @cached_property
    def _shows_results(self) -> bool:
        return RESULT in self._after_reply([tool_message("tool", RESULT)], header=True)


def tool_message(name: str, content: str) -> Message:
    """A tool's result as templates of every family take it."""
    # Mistral's templates demand an id of nine letters and digits.
    return {"role": "tool", "name": name, "tool_call_id": "call00000", "content": content}


def _check_turns(messages: Sequence[Message], turns: Sequence[int]) -> None:
    roles = ", ".join(str(m["role"]) for m in messages)
    require(
        bool(turns) and turns[-1] == len(messages) - 1,
        f"roles {roles}: a dialogue must end with the assistant's",
    )
    require(turns[0] > 0, f"roles {roles}: a dialogue must not begin with the assistant")
    adjacent = any(b - a == 1 for a, b in itertools.pairwise(turns))
    require(not adjacent, f"roles {roles}: two assistant messages are adjacent; join them into one")
