"""Checks whether appending to a conversation is exact with a tokenizer's chat template.

    python tools/lint_template.py FOLDER [--template FILE_OR_NAME] [--dialect hermes]

FOLDER holds the tokenizer. Exit code 1 where there are errors. Where there are errors or warnings,
the shipped template `hermes` is checked too, if the tokenizer has its tokens.
"""

from __future__ import annotations

import argparse
import sys

from rest_mega.config import ConfigError
from rest_mega.data.chat import ChatFormat
from rest_mega.data.template_lint import ERROR, NOTE, Finding, lint, report
from rest_mega.data.tokenizer import load_tokenizer


def findings(folder: str, template: str, dialect: str) -> list[Finding]:
    """What the linter finds for a tokenizer's folder."""
    return lint(ChatFormat(load_tokenizer(folder, template)), dialect)


def main(words: list[str]) -> int:
    """Print the findings; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--template", default="", help="a Jinja file, or hermes")
    parser.add_argument("--dialect", default="hermes")
    options = parser.parse_args(words)
    try:
        found = findings(options.folder, options.template, options.dialect)
        print(report(found), end="")
        if options.template != "hermes" and any(f.grade != NOTE for f in found):
            left = [f for f in findings(options.folder, "hermes", "hermes") if f.grade != NOTE]
            names = ", ".join(f.name for f in left) or "none of these"
            print(f"with tokenizer.chat_template=hermes: {names}")
    except ConfigError as error:
        print(f"lint_template: {error}", file=sys.stderr)
        return 2
    return int(any(f.grade == ERROR for f in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
