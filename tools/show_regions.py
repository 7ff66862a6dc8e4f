"""Prints a reply with the region and the weight of every token.

    python tools/show_regions.py reply.txt --tokenizer FOLDER --dialect hermes
    python tools/show_regions.py - --tokenizer FOLDER --plain --preset rest-code --step 100

FILE holds one assistant reply as text; the end-of-turn token may close it, and one newline at the
very end is the editor's. The text is cut into tokens as the tokenizer would cut it; the weights are
those of one sequence that holds this reply alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from rest_mega.config import ConfigError, CreditConfig, one_of, require
from rest_mega.credit.entropy import EntropyTracker
from rest_mega.credit.regions import Region, tag
from rest_mega.credit.weights import PRESETS, normalise, region_weights
from rest_mega.data.tokenizer import Tokenizer, load_tokenizer
from rest_mega.dialects import DIALECTS, parse
from rest_mega.records import Floats, SmallInts

COLOURS: Mapping[Region, int] = {
    Region.REASONING: 250,
    Region.FORMAT: 39,
    Region.TOOL_NAME: 208,
    Region.ARG_KEY: 179,
    Region.ARG_VALUE: 114,
    Region.ARG_SCAFFOLD: 101,
    Region.SCAFFOLD: 243,
    Region.ANSWER: 255,
    Region.END_OF_TURN: 141,
    Region.OBSERVATION: 238,
    Region.MALFORMED: 196,
}
"""Region -> foreground in the terminal's palette of 256."""
HIDDEN = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
"""Control characters -> their pictures, so that a reply cannot steer the terminal."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; 2 where the words or the files cannot be used."""
    options = _parser().parse_args(words)
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        tokens, ended = _read(options.file, tokenizer)
        regions_T = tag(tokens, options.dialect, end_of_turn=ended)
        weights_T = _weights(options, regions_T)
        malformed = parse(b"".join(tokens[:-1] if ended else tokens), options.dialect).error
    except (ConfigError, OSError) as error:
        print(f"show_regions: {error}", file=sys.stderr)
        return 2
    show = _plain if options.plain else _coloured
    for line in show(tokens, regions_T, weights_T):
        print(line)
    if malformed:
        print(f"malformed: {malformed}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="the reply; - reads standard input")
    parser.add_argument(
        "--tokenizer", required=True, help="folder or file, Hugging Face or SentencePiece"
    )
    parser.add_argument("--dialect", default="hermes", help=", ".join(DIALECTS))
    parser.add_argument("--preset", default="rest", help=", ".join(PRESETS))
    parser.add_argument("--progress", type=float, default=0.0, help="of the run, 0 to 1")
    parser.add_argument("--step", type=int, default=1, help="from 1; rest-code goes by it alone")
    parser.add_argument(
        "--entropy",
        metavar="REGION=NATS",
        action="append",
        default=[],
        help="entropy of a region, once per region; the others count as the average of those "
        "given, or 1 where none is",
    )
    parser.add_argument("--plain", action="store_true", help="one line per token, without colours")
    return parser


def _read(file: str, tokenizer: Tokenizer) -> tuple[list[bytes], bool]:
    """(bytes of every token, whether the last one ends the turn)."""
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        text = data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error}") from error
    ids = tokenizer.encode(text)
    ended = bool(ids) and ids[-1] in tokenizer.end_of_turn_ids
    return [tokenizer.token_bytes(i) for i in ids], ended


def _weights(options: argparse.Namespace, regions_T: SmallInts) -> Floats:
    require(0 <= options.progress <= 1, f"--progress {options.progress} must be in [0, 1]")
    require(options.step >= 1, f"--step {options.step} must be at least 1")
    raw_K = region_weights(
        CreditConfig(preset=options.preset),
        _entropies(options.entropy),
        progress=options.progress,
        step=options.step,
    )
    everything = np.ones(len(regions_T), dtype=np.bool_)
    return normalise(raw_K, regions_T, everything, np.zeros(len(regions_T), dtype=np.int32))


def _entropies(words: Sequence[str]) -> Floats:
    """entropy_K of the words REGION=NATS, by the rules of a run's first step."""
    sum_K, count_K = (np.zeros(len(Region), dtype=np.float32) for _ in range(2))
    known = {region.name.lower(): region for region in Region}
    for word in words:
        name, _, nats = word.partition("=")
        one_of("--entropy", name, known)
        try:
            value = float(nats)
        except ValueError:
            value = math.nan
        require(0 <= value < math.inf, f"--entropy {word} must be REGION=NATS with NATS >= 0")
        sum_K[known[name]], count_K[known[name]] = value, 1
    tracker = EntropyTracker(momentum=0.0)
    tracker.update(sum_K, count_K)
    return tracker.means_K


def _plain(tokens: Sequence[bytes], regions_T: SmallInts, weights_T: Floats) -> list[str]:
    """One line per token: its bytes, region, weight."""
    return [
        f"{token!r}\t{Region(region).name.lower()}\t{weight:.4f}"
        for token, region, weight in zip(tokens, regions_T, weights_T, strict=True)
    ]


def _coloured(tokens: Sequence[bytes], regions_T: SmallInts, weights_T: Floats) -> list[str]:
    """The reply in colours, and a line for each region that it has."""
    runs = groupby(zip(regions_T.tolist(), tokens, strict=True), key=lambda pair: pair[0])
    text = [
        _paint(b"".join(token for _, token in run).decode("utf-8", "replace"), Region(region))
        for region, run in runs
    ]
    lines = ["".join(text), ""]
    for region in sorted(set(regions_T.tolist())):
        own = regions_T == region
        name = f"{Region(region).name.lower():<14}"
        row = f"{int(own.sum()):>6} tokens, weight {float(weights_T[own][0]):.4f}"
        lines.append(_paint(name, Region(region)) + row)
    return lines


def _paint(text: str, region: Region) -> str:
    """Line by line, because pagers forget colours at the end of a line."""
    colour = f"\x1b[38;5;{COLOURS[region]}m"
    parts = text.translate(HIDDEN).split("\n")
    return "\n".join(f"{colour}{part}\x1b[0m" if part else "" for part in parts)


if __name__ == "__main__":
    sys.exit(main())
