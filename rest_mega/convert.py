"""`rest-mega convert`: Hugging Face safetensors <-> Megatron distributed checkpoint, or a check of
one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rest_mega import launch
from rest_mega.config import ParallelConfig, require
from rest_mega.environments import load_modules

if TYPE_CHECKING:
    from rest_mega.sync.convert import Job


def main(words: Sequence[str]) -> int:
    """Convert, or with a source alone check; returns the exit code 0. ConfigError says what does
    not fit."""
    given = _parser().parse_args(list(words))
    require(
        launch.world_size() == 1,
        f"convert runs in one process, not in {launch.world_size()}; call it without torchrun",
    )
    load_modules(given.module)
    from rest_mega.trainer import checkpoint_files

    source = checkpoint_files.newest(given.source) or given.source
    if given.target is None:
        return _check(source, quiet=given.quiet)
    from rest_mega.sync import convert

    job = convert.prepare(
        source,
        given.target,
        given.model,
        dtype=convert.DTYPES[given.dtype] if given.dtype else None,
        verify=not given.no_verify,
        quiet=given.quiet,
    )
    _check_tokenizer(job.model, job.architecture.vocab_size)
    with _one_process() as parallel:
        convert.convert(job, parallel)
        sys.stdout.write(f"{job.source} -> {job.target}{_verified(job)}\n")
        if given.logits:
            _compare(job, parallel)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rest-mega convert",
        description="Convert Hugging Face safetensors to a Megatron distributed checkpoint "
        "(torch_dist) or back; the source tells the direction. Without TARGET: check every byte of "
        "an earlier conversion.",
    )
    parser.add_argument("source", type=Path, help="a Hugging Face folder, a torch_dist checkpoint")
    parser.add_argument("target", type=Path, nargs="?", help="a folder that does not exist yet")
    parser.add_argument("--model", type=Path, help="Hugging Face folder with config.json and "
                        "tokenizer, for a checkpoint without")  # fmt: skip
    parser.add_argument("--module", action="append", default=[], help="a file that adds the "
                        "model's family (docs/extending.md); may be repeated")  # fmt: skip
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as stored")
    parser.add_argument("--logits", action="store_true", help="also compare the logits of a few "
                        "tokens with transformers; holds the model twice")  # fmt: skip
    parser.add_argument("--no-verify", action="store_true", help="do not read the result back")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


@contextmanager
def _one_process() -> Iterator[Any]:
    from rest_mega.trainer import parallel

    place = parallel.start(ParallelConfig(), "cpu")
    try:
        yield place
    finally:
        parallel.stop()


def _check(folder: Path, *, quiet: bool) -> int:
    from rest_mega.sync import convert

    with _one_process() as parallel:
        count = convert.check(folder, parallel, quiet=quiet)
    sys.stdout.write(f"{folder}: all bytes of {count} tensors are as they were converted\n")
    return 0


def _check_tokenizer(model: Path, vocab_size: int) -> None:
    """A tokenizer smaller than the embedding is common (padding rows); a larger one has tokens
    without a row."""
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return
    from rest_mega.data.tokenizer import load_tokenizer

    size = load_tokenizer(str(model), "").vocab_size
    require(
        size <= vocab_size,
        f"the tokenizer in {model} has {size} tokens, config.json {vocab_size} embedding rows: use "
        "the tokenizer that belongs to the weights, or resize the embedding with transformers",
    )


def _verified(job: Job) -> str:
    return ", read back bit for bit" if job.verify else ", not verified"


def _compare(job: Job, parallel: Any) -> None:
    from rest_mega.sync.parity import compare_logits

    folders = (job.target, job.source) if job.to_torch_dist else (job.source, job.target)
    gap = compare_logits(*folders, job.architecture, parallel)
    sys.stdout.write(f"logits agree with transformers to {gap:.1e} of the largest\n")
