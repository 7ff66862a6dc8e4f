"""Dialects of tool calls: the bytes of a reply -> a region for every byte, and the parsed calls.

The one parser for data, rewards, environments, rollout, credit and evaluation. Rules of every
dialect:

- reading is linear in the reply's length whatever it holds, and never raises;
- a reply is read from left to right, and a block counts once it is complete: cutting a reply
  anywhere leaves the regions before the cut as they were, or makes them MALFORMED;
- the first block that breaks the grammar is MALFORMED with all that follows, and the reply has no
  calls; a reply that ends with the beginning of a tag (a lone "<", say) is one of these;
- inside a block of thought everything is reasoning, tags of other blocks too;
- white space that opens a reply or follows a tag is SCAFFOLD; white space after text belongs to the
  text.

A dialect is one entry of `DIALECTS`: its tags, and how calls are written between them. A file that
`environment.modules` names may add one.
"""

from __future__ import annotations

from rest_mega.config import one_of, require
from rest_mega.dialects import json_calls, python_calls
from rest_mega.dialects.grammar import NEVER, Bare, Block, Dialect, read
from rest_mega.dialects.reply import Region, Reply
from rest_mega.dialects.tape import MalformedError, Tape

_THINK = Block("<think>", "</think>", Region.REASONING)

DIALECTS: dict[str, Dialect] = {
    # Qwen, Hermes: one object per <tool_call> block, any number of blocks.
    "hermes": Dialect((_THINK, Block("<tool_call>", "</tool_call>", json_calls.one))),
    # ToolRL, ResT: one block with an object per line, and the answer in a block of its own.
    "toolrl": Dialect(
        (
            _THINK,
            Block("<tool_call>", "</tool_call>", json_calls.several),
            Block("<response>", "</response>", Region.ANSWER),
        )
    ),
    # Llama 3.x: objects parted by semicolons, from the start of the reply or after
    # <|python_tag|>.
    "llama3": Dialect(
        (Block("<|python_tag|>", "", json_calls.until_end),),
        Bare(r"\{", NEVER, json_calls.until_end),
    ),
    # Mistral: one array of objects after [TOOL_CALLS].
    "mistral": Dialect((Block("[TOOL_CALLS]", "", json_calls.array),)),
    # Llama 3.2 and 4, BFCL: the reply is a Python list of calls, or stands between Llama 4's
    # tags.
    "pythonic": Dialect(
        (Block("<|python_start|>", "<|python_end|>", python_calls.calls),),
        Bare(python_calls.START, python_calls.PREFIX, python_calls.calls),
    ),
}


def add_dialect(name: str, dialect: Dialect) -> None:
    """Make `tokenizer.dialect=name` mean this dialect; ConfigError where the name is taken."""
    require(name not in DIALECTS, f"dialect {name!r} is there already; give yours another name")
    DIALECTS[name] = dialect


def parse(reply: bytes, dialect: str) -> Reply:
    """Parse one assistant reply (without its end-of-turn token) in linear time; no reply makes it
    raise.

    Raises ConfigError when `dialect` is no name in `DIALECTS`.
    """
    one_of("dialect", dialect, DIALECTS)
    tape = Tape(reply)
    try:
        read(tape, DIALECTS[dialect])
    except MalformedError as error:
        return tape.finish(str(error))
    return tape.finish()


__all__ = ["DIALECTS", "Bare", "Block", "Dialect", "Region", "Reply", "add_dialect", "parse"]
