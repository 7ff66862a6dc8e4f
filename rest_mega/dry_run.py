"""`train --dry-run`: names and shapes of model and micro-batch at a real layout, without GPUs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from rest_mega import launch
from rest_mega.cli import read
from rest_mega.config import RunConfig, require
from rest_mega.environments import load_modules
from rest_mega.records import Microbatch, Sample


def main(words: Sequence[str]) -> int:
    """Build first and last tensor rank of every pipeline stage on the meta device, send the shapes
    of a full micro-batch through it, and print what each holds; ConfigError where anything does not
    fit."""
    parser = argparse.ArgumentParser("rest-mega train CONFIG --dry-run", description=main.__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--ranks", type=int, help="ranks of the run; default: the fewest")
    known, rest = parser.parse_known_args(list(words))
    launch.hide_gpus()
    config = read(["train", *rest])[1]
    load_modules(config.environment.modules)
    return walk(config, known.ranks)


def walk(config: RunConfig, ranks: int | None) -> int:
    """The dry run of `config` on `ranks` ranks (None: the fewest it can run on); prints a table."""
    from rest_mega.planning.estimate import smallest_world
    from rest_mega.sync.names import hf_names
    from rest_mega.trainer.imagined import rank_of
    from rest_mega.trainer.model import build, read_architecture

    a = read_architecture(config.model.path)
    sizes = config.parallel
    world = smallest_world(sizes) if ranks is None else ranks
    a.check(sizes)
    config.check_world(world)
    met: set[str] = set()
    batch = _fullest(config)
    sys.stdout.write(" rank stage tensor layers      parameters  hidden states\n")
    for stage in range(sizes.pipeline):
        for tensor in sorted({0, sizes.tensor - 1}):
            rank = stage * (world // sizes.pipeline) + tensor
            with rank_of(sizes, rank, world) as place:
                assert (place.pipeline_rank, place.tensor_rank) == (stage, tensor)
                chunks = build(a, config.model, place)
                names, count = _matched(chunks, a, place)
                shape = _forward(chunks, batch, a, place)
            met |= names
            layers = a.layers // sizes.pipeline
            sys.stdout.write(f"{rank:5}{stage:6}{tensor:7}{layers:7}{count:16,}  {shape}\n")
    wanted = {n for n in hf_names(a) if sizes.expert == 1 or ".experts." not in n}
    missing = sorted(wanted - met)
    require(
        not missing,
        f"{len(missing)} tensors of model.path={config.model.path!r} have no place in the model "
        f"({', '.join(missing[:3])}); add rows to rest_mega/sync/names.py",
    )
    sys.stdout.write(f"{len(met)} Hugging Face tensors have their places on {world} ranks\n")
    trained = int(batch.mask_T.sum())
    sys.stdout.write(
        f"a micro-batch: {len(batch.ids_T):,} positions, {trained:,} at most reach the head\n"
    )
    if a.experts:
        sys.stdout.write("experts were left out: their tokens choose them by their values\n")
    return 0


def _fullest(config: RunConfig) -> Microbatch:
    """As many of the longest trajectories as a micro-batch takes, all but the first token
    sampled."""
    from rest_mega.trainer.packing import pack, pad_multiple

    length = config.rollout.max_tokens
    sample = Sample(
        ids_T=np.zeros(length, np.int32),
        mask_T=np.arange(length) > 0,
        regions_T=np.zeros(length, np.int8),
        logprobs_T=np.zeros(length, np.float32),
        version_T=np.zeros(length, np.int32),
        advantage=0.0,
        group=0,
    )
    count = config.packing.tokens // (length - 1)
    multiple = pad_multiple(config.parallel)
    (batch,) = pack([sample] * count, config.packing.tokens, pad_multiple=multiple)
    return batch


def _forward(chunks: list[Any], batch: Microbatch, a: Any, place: Any) -> str:
    """The shape of what a rank hands on, of each of its chunks the same; ConfigError where it is
    not this rank's part of the micro-batch."""
    import torch

    from rest_mega.trainer.forward import local_part, run_chunk
    from rest_mega.trainer.imagined import leave_out_experts

    part, sizes = local_part(batch, place), place.config
    rows = len(part.ids_T) // (sizes.tensor if sizes.sequence else 1)
    leave_out_experts(chunks)
    for number, chunk in enumerate(chunks):
        if number or not place.is_first_stage:
            dtype = next(chunk.parameters()).dtype
            chunk.set_input_tensor(torch.empty(rows, 1, a.hidden, dtype=dtype))
        chunk.eval()  # recomputation, which asks a tensor for its value, changes no shape
        shape = tuple(run_chunk(chunk, part, place.device).shape)
        require(
            shape == (rows, 1, a.hidden),
            f"chunk {number} of stage {place.pipeline_rank} makes hidden states {shape} of "
            f"({rows}, 1, {a.hidden}): mend its layers in rest_mega/trainer",
        )
    return f"{rows} x {a.hidden}"


def _matched(chunks: list[Any], a: Any, place: Any) -> tuple[set[str], int]:
    """(Hugging Face tensors met, parameters) of a rank; each parameter's shape is that of its
    pieces, and all of them are what the plan counts."""
    from rest_mega.planning.parameters import stage_parameters
    from rest_mega.sync.names import cut, hf_shape, named_parameters, pieces

    met, count = set(), 0
    for name, parameter in named_parameters(chunks):
        found = pieces(name, a, *cut(name, place))
        met |= {piece.hf_name for piece in found}
        count += parameter.numel()
        shape = list(hf_shape(found[0].hf_name, a))
        shape[found[0].axis] = sum(piece.stop - piece.start for piece in found)
        if "word_embeddings" in name or "output_layer" in name:  # padded rows are nobody's
            shape[0] = a.padded_vocab(place.config.tensor) // place.config.tensor
        require(
            tuple(parameter.shape) == tuple(shape),
            f"{name} has shape {tuple(parameter.shape)} here and {tuple(shape)} in the checkpoint "
            "that model.path describes; mend its row in rest_mega/sync/names.py",
        )
    told = stage_parameters(a, place.config, place.pipeline_rank).total
    require(count == told, f"a rank holds {count} parameters where the plan counts {told}")
    return met, count
