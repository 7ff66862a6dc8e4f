"""`train --dry-run`: the model's shapes and names at the run's real layout, without its GPUs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rest_mega.cli import read
from rest_mega.config import RunConfig, require
from rest_mega.environments import load_modules


def main(words: Sequence[str]) -> int:
    """Build first and last tensor rank of every pipeline stage on the meta device, and print what
    each holds; ConfigError where anything does not fit."""
    parser = argparse.ArgumentParser("rest-mega train CONFIG --dry-run", description=main.__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--ranks", type=int, help="ranks of the run; default: the fewest")
    known, rest = parser.parse_known_args(list(words))
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
    sys.stdout.write(" rank stage tensor layers      parameters\n")
    for stage in range(sizes.pipeline):
        for tensor in sorted({0, sizes.tensor - 1}):
            rank = stage * (world // sizes.pipeline) + tensor
            with rank_of(sizes, rank, world) as place:
                assert (place.pipeline_rank, place.tensor_rank) == (stage, tensor)
                chunks = build(a, config.model, place)
                names, count = _matched(chunks, a, place)
            met |= names
            layers = a.layers // sizes.pipeline
            sys.stdout.write(f"{rank:5}{stage:6}{tensor:7}{layers:7}{count:16,}\n")
    wanted = {n for n in hf_names(a) if sizes.expert == 1 or ".experts." not in n}
    missing = sorted(wanted - met)
    require(
        not missing,
        f"{len(missing)} tensors of model.path={config.model.path!r} have no place in the model "
        f"({', '.join(missing[:3])}); add rows to rest_mega/sync/names.py",
    )
    sys.stdout.write(f"{len(met)} Hugging Face tensors have their places on {world} ranks\n")
    return 0


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
