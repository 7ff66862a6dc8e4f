"""This rank's shards -> a stream of whole Hugging Face tensors on the replicas' players.

All ranks call `stream` together and exhaust it. Parameters travel one at a time, as bytes, from the
ranks that hold their pieces to a player, which puts them back; at no time does it hold more than
one parameter's tensors that it has not handed over. All ranks go through the transfers in one
order, so that none waits for another in a circle. Only experts that no rank of a replica holds
(spread over data-parallel ranks) come from outside it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from rest_mega.sync.names import Piece, hf_names, hf_shape, is_expert, named_parameters, pieces
from rest_mega.sync.safetensors_files import SHARD_BYTES, shard_name, write_index
from rest_mega.trainer.model import Architecture
from rest_mega.trainer.parallel import Parallel

NamedTensor = tuple[str, torch.Tensor]

NOT_SIDE_FILES = ("conversion.json", "manifest.json", "metadata.json", "run_state.json")
"""JSON files of a checkpoint folder that speak of its own tensors or run."""


@dataclass(frozen=True)
class Transfer:
    """One parameter's way to one player."""

    name: str
    player: int
    sources: tuple[int, ...]
    """Global ranks that hold its pieces, in the order of the cut."""
    shapes: tuple[list[int], ...]


class Exporter:
    """Knows once and for all which rank holds what; `stream` may then be called every step."""

    def __init__(self, chunks: list[Any], architecture: Architecture, parallel: Parallel) -> None:
        """Collective over all ranks."""
        self._architecture, self._parallel = architecture, parallel
        self._mine = {
            name: parameter
            for name, parameter in named_parameters(chunks)
            if name != "output_layer.weight" or not architecture.tied
        }
        place = {
            "stage": parallel.pipeline_rank,
            "tensor": parallel.tensor_rank,
            "context": parallel.context_rank,
            "replica": parallel.data_rank,
            "plays": parallel.is_player,
            "shapes": {name: list(p.shape) for name, p in self._mine.items()},
        }
        self._places = [json.loads(text) for text in parallel.gather_text(json.dumps(place))]
        me = parallel.rank
        self._transfers = [t for t in self._all_transfers() if me == t.player or me in t.sources]
        self._dtype = next(iter(self._mine.values())).dtype

    @torch.no_grad()
    def stream(self, *, head_only: bool = False) -> Iterator[NamedTensor]:
        """(Hugging Face name, whole CPU tensor) on every player (`head_only`: on the run's head),
        nothing elsewhere; collective over all ranks."""
        for transfer in self._transfers:
            if head_only and transfer.player != 0:
                continue
            shards = [
                self._move(transfer.name, source, transfer.player, shape)
                for source, shape in zip(transfer.sources, transfer.shapes, strict=True)
            ]
            if self._parallel.rank == transfer.player:
                yield from self._assemble(transfer.name, shards)

    def _all_transfers(self) -> Iterator[Transfer]:
        """Every parameter to every player, stage by stage; the same on all ranks."""
        players = sorted((p["replica"], rank) for rank, p in enumerate(self._places) if p["plays"])
        for stage in range(self._parallel.config.pipeline):
            for name, holders in self._holders(stage).items():
                for replica, player in players:
                    sources = tuple(self._sources(name, holders, replica))
                    shapes = tuple(self._places[rank]["shapes"][name] for rank in sources)
                    yield Transfer(name, player, sources, shapes)

    def _holders(self, stage: int) -> dict[str, list[int]]:
        """Per parameter of a stage, the global ranks that hold it or a piece of it."""
        holders: dict[str, list[int]] = {}
        for rank, place in enumerate(self._places):
            if place["stage"] == stage:
                for name in place["shapes"]:
                    holders.setdefault(name, []).append(rank)
        return holders

    def _sources(self, name: str, holders: list[int], replica: int) -> list[int]:
        """The ranks from which a replica's player gets a parameter: its own replica's where it can
        be."""
        places = self._places
        mine = [rank for rank in holders if places[rank]["replica"] == replica]
        if is_expert(name):
            return (mine or [holders[replica % len(holders)]])[:1]
        cut = [rank for rank in mine if places[rank]["context"] == 0]
        return sorted(cut, key=lambda rank: int(places[rank]["tensor"]))

    def _move(self, name: str, source: int, player: int, shape: list[int]) -> torch.Tensor:
        """One shard from `source` to `player`; what other ranks get back is empty and not used."""
        me, group = self._parallel.rank, self._parallel.control
        if me == source:
            mine = self._mine[name].detach().contiguous().cpu()
            if me != player:
                dist.send(mine.view(-1).view(torch.uint8), player, group=group)
            return mine
        shard = torch.empty(shape if me == player else [0], dtype=self._dtype)
        if me == player:
            dist.recv(shard.view(-1).view(torch.uint8), source, group=group)
        return shard

    def _assemble(self, name: str, shards: list[torch.Tensor]) -> Iterator[NamedTensor]:
        a = self._architecture
        parts = [self._pieces(name, rank, len(shards)) for rank in range(len(shards))]
        whole = {
            p.hf_name: torch.empty(hf_shape(p.hf_name, a), dtype=self._dtype)
            for ps in parts
            for p in ps
        }
        for shard, ps in zip(shards, parts, strict=True):
            offset = 0
            for piece in ps:
                length = piece.stop - piece.start
                target = whole[piece.hf_name].narrow(piece.axis, piece.start, length)
                target.copy_(shard.narrow(piece.axis, offset, length))
                offset += length
        yield from whole.items()

    @functools.cache  # noqa: B019  # an exporter lives as long as its model
    def _pieces(self, name: str, rank: int, size: int) -> list[Piece]:
        return pieces(name, self._architecture, rank, size)


def save_hf(
    exporter: Exporter,
    architecture: Architecture,
    source: str,
    folder: Path,
    *,
    write: bool,
    tokenizer: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the policy as a Hugging Face checkpoint that `transformers` and SGLang load; collective
    over all ranks.

    config.json is copied from `source`, tokenizer and template from `tokenizer` (empty: `source`).
    The folder appears complete or not at all. `write` is True on the one rank that writes; it holds
    at most about `shard_bytes` of tensors at a time.
    """
    stream = exporter.stream(head_only=True)
    if not write:
        for _ in stream:
            pass
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    written, dtype = _write_shards(stream, partial, shard_bytes)
    missing = [name for name in hf_names(architecture) if name not in written]
    assert not missing, f"export lacks {missing[:5]}"
    copy_side_files([Path(source), *([Path(tokenizer)] if tokenizer else [])], partial, dtype)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _write_shards(
    stream: Iterator[NamedTensor], folder: Path, limit: int
) -> tuple[dict[str, Path], str]:
    """(file of every tensor, dtype): one model.safetensors, or several with their index."""
    where: dict[str, Path] = {}
    held: dict[str, torch.Tensor] = {}
    files: list[Path] = []
    total, dtype = 0, ""

    def flush() -> None:
        files.append(folder / f"{len(files)}.safetensors")
        save_file(held, str(files[-1]), metadata={"format": "pt"})
        files[-1].chmod(0o644)  # safetensors writes for the owner alone
        where.update(dict.fromkeys(held, files[-1]))
        held.clear()

    for name, tensor in stream:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > limit:
            flush()
        held[name], total = tensor, total + tensor.nbytes
        dtype = str(tensor.dtype).removeprefix("torch.")
    flush()
    names = {file: shard_name(n, len(files)) for n, file in enumerate(files, start=1)}
    for file, name in names.items():
        file.rename(folder / name)
    by_file = {names[f]: [name for name, file in where.items() if file == f] for f in files}
    write_index(folder, by_file, total)
    return where, dtype


def copy_side_files(sources: list[Path], target: Path, dtype: str) -> None:
    """config.json of the first source; tokenizer and template files of all, the last winning."""
    for source in sources:
        for file in sorted(source.iterdir()) if source.is_dir() else [source]:
            keep = file.suffix in (".json", ".jinja", ".model", ".txt")
            own = file.name in NOT_SIDE_FILES or file.name.endswith(".index.json")
            if keep and not own:
                (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((sources[0] / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
