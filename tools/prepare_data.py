"""Turns public tool-use data into the trainer's prompts: checked, without duplicates, split.

    python tools/prepare_data.py train.parquet --format toolrl --out prompts/train.jsonl
    python tools/prepare_data.py dialogues.jsonl --format chat --out prompts/train.jsonl \\
        --held-out prompts/held_out.jsonl --tokenizer FOLDER --max-tokens 1024

Formats (docs/data.md shows a row of each):

    toolrl     rlla_4k's Parquet columns, or its raw rows {"instruction", "input", "output"}
    bfcl       single-turn BFCL_v4_*.json; answers from possible_answer/ beside the file
    api-bank   {"system", "user", "answer", "other"}
    chat       {"messages", "tools"} as OpenAI writes them; a prompt per assistant turn
    prompts    the trainer's own rows

Exit code 0: the files are written, and bad rows, if any, are in the reject file with place and
reason. Exit code 2: nothing is written, and one message says why; with --strict also for the first
bad row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rest_mega.config import ConfigError, require
from rest_mega.data.formats import FORMATS
from rest_mega.data.prepare import Plan, Report, prepare
from rest_mega.records import Prompt


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; 2 where the words or the files cannot be used."""
    options = _parser().parse_args(words)
    try:
        plan = _plan(options)
        report = prepare(plan, _counter(options.tokenizer, options.chat_template))
    except (ConfigError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    print("\n".join(_lines(plan, report)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sources", metavar="FILE", nargs="+", type=Path, help=".jsonl, .json or .parquet")
    add("--format", required=True, help=", ".join(FORMATS))
    add("--out", required=True, type=Path, help="training prompts, .jsonl")
    add("--held-out", type=Path, metavar="FILE", help="held-out prompts; without it no split")
    add(
        "--held-out-share",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="expected share of rows that are held out, chosen by a hash of seed and id; 0.1",
    )
    add("--seed", type=int, default=0, help="of the split; 0")
    add(
        "--rejects",
        type=Path,
        metavar="FILE",
        help="bad rows with place and reason; default: OUT with .rejects.jsonl, empty if none",
    )
    add("--strict", action="store_true", help="the first bad row ends the work with exit code 2")
    add(
        "--system",
        default="",
        metavar="TEXT",
        help="a system message for prompts that have none, as data.system adds in a run",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        help="counts tokens: a folder or file, Hugging Face or SentencePiece",
    )
    add(
        "--chat-template",
        default="",
        metavar="NAME",
        help="Jinja file, or hermes, instead of the tokenizer's own; as tokenizer.chat_template",
    )
    add(
        "--max-tokens",
        type=int,
        default=0,
        metavar="N",
        help="leave out longer prompts, tools and the header of the reply included; needs "
        "--tokenizer",
    )
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(
        format=options.format,
        sources=tuple(options.sources),
        out=options.out,
        held_out=options.held_out,
        share=options.held_out_share,
        seed=options.seed,
        rejects=options.rejects,
        strict=options.strict,
        system=options.system,
        max_tokens=options.max_tokens,
    )


def _counter(tokenizer: str | None, template: str) -> Callable[[Prompt], int] | None:
    """Tokens of a prompt as a rollout begins with it, without tools that the row only names (their
    specs are an environment's); None without a tokenizer."""
    if tokenizer is None:
        require(not template, f"--chat-template {template} needs --tokenizer")
        return None
    from rest_mega.data.chat import ChatFormat
    from rest_mega.data.tokenizer import load_tokenizer

    chat = ChatFormat(load_tokenizer(tokenizer, template))

    def count(prompt: Prompt) -> int:
        specs = [one for one in prompt.tools if not isinstance(one, str)]
        return len(chat.prompt_ids(prompt.messages, specs))

    return count


def _lines(plan: Plan, report: Report) -> list[str]:
    """What became of the rows, for the console."""
    lines = [f"{report.rows} rows read, {report.rejected.total()} rejected"]
    lines += [f"{count:8}  {rule}" for rule, count in report.rejected.most_common()]
    if report.rejected:
        lines.append(f"          see {plan.rejects_path}")
    repeated = f"{report.duplicates} duplicates"
    lines.append(f"left out: {repeated} ({report.conflicts} of them with other gold calls)")
    if plan.max_tokens:
        lines[-1] += f", {report.too_long} prompts longer than {plan.max_tokens} tokens"
    lines.append(f"{plan.out}: {report.train} prompts")
    if plan.held_out:
        lines.append(f"{plan.held_out}: {report.held_out} prompts held out")
    if report.longest:
        lines.append(f"the longest has {report.longest} tokens")
    return lines


if __name__ == "__main__":
    sys.exit(main())
