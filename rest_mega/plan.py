"""Memory, step time and layouts before the launch, from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rest_mega.cli import read
from rest_mega.environments import load_modules


def main(words: Sequence[str]) -> int:
    """Plan CONFIG [section.key=value ...] at its own layout (--ranks), or propose layouts (--gpus);
    exit code 1: it does not fit."""
    parser = argparse.ArgumentParser("rest-mega plan", description=main.__doc__)
    parser.add_argument("--gpus", type=int, help="propose layouts for so many GPUs")
    parser.add_argument("--ranks", type=int, help="the config's own layout on so many GPUs")
    parser.add_argument("--gpu", default="h100-80g", help="a name of planning/gpus.py's table")
    known, rest = parser.parse_known_args(list(words))
    config = read(["train", *rest])[1]
    load_modules(config.environment.modules)
    from rest_mega.planning import command  # torch: only where there is a plan to make

    return command.main(config, known.gpu, known.gpus, known.ranks)
