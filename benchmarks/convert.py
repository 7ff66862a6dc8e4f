"""What a conversion costs beside `cp` of the same cached files, both directions, and its memory.

python benchmarks/convert.py [--gib 2] [--rounds 3] [--folder /tmp]

A made-up bf16 checkpoint (Llama sizes) is written into a temporary folder, converted to torch_dist
and back, and removed with all that came of it. Printed: median wall and processor seconds of
cp and of each conversion without and with its verification, their ratio to cp's (1 is the speed of
cp; on a busy machine the processor's is the better one), and the peak of resident memory above
start. Targets: 0.7 x the speed of cp (wall), 2x the largest tensor + 256 MiB; each is marked as met
or missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil
import torch
import xxhash

from rest_mega.config import ParallelConfig
from rest_mega.sync import convert
from rest_mega.sync.byte_ranges import Files, blocks
from rest_mega.sync.names import hf_names, hf_shape
from rest_mega.sync.safetensors_files import Entry, lay_out, plan, write_index
from rest_mega.trainer import parallel
from rest_mega.trainer.model import read_architecture

SPEED = 0.7
HIDDEN, FFN, VOCAB = 2048, 5632, 32000
LAYER_BYTES = 2 * (HIDDEN * (2 * HIDDEN + 2 * 512) + 3 * HIDDEN * FFN)


def make(folder: Path, gib: float) -> int:
    """A random checkpoint of about `gib` GiB in two files; its largest tensor's bytes."""
    layers = max(1, int((gib * 2**30 - 2 * 2 * VOCAB * HIDDEN) / LAYER_BYTES))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "silu",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    a = read_architecture(str(folder))
    entries = [Entry(name, hf_shape(name, a), torch.bfloat16) for name in hf_names(a)]
    files = plan(entries, int(gib * 2**30 * 0.6))
    noise = torch.randn(2**24).to(torch.bfloat16)
    for name, group in files.items():
        files_, places = Files(os.O_WRONLY), lay_out(folder / name, group)
        for extent in places.values():
            width = extent.nbytes // extent.shape[0]
            for start, stop in blocks(extent.shape, extent.dtype):
                part = noise[: (stop - start) * width // 2]
                files_.write(extent.file, extent.offset + start * width, part)
    write_index(
        folder, {n: [e.name for e in g] for n, g in files.items()}, sum(e.nbytes for e in entries)
    )
    return max(entry.nbytes for entry in entries)


class Peak:
    """The largest resident memory while it is entered, above that at entry; sampled."""

    def __enter__(self) -> Peak:
        self._process, self._done = psutil.Process(), threading.Event()
        self._start = self._most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def mib(self) -> float:
        return (self._most - self._start) / 2**20


def seconds(work: Callable[[], object], target: Path) -> tuple[float, float]:
    """(wall, processor) of one run, its target removed before."""
    shutil.rmtree(target, ignore_errors=True)
    begin, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin, time.process_time() - busy


def run_cp(source: Path, target: Path) -> None:
    """cp of the weights, and fsync of the copies: a conversion is on the disk too when it ends."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in (".safetensors", ".distcp"):
            shutil.copyfile(file, target / file.name)
            with (target / file.name).open("rb") as stream:
                os.fsync(stream.fileno())


def checksums() -> None:
    """GiB per second of a core of the sums that were considered, and of copying."""
    block = torch.randint(0, 256, (2**26,), dtype=torch.uint8).numpy().data
    sums: dict[str, Callable[[], object]] = {
        "xxh3_128": lambda: xxhash.xxh3_128_digest(block),
        "crc32": lambda: zlib.crc32(block),
        "sha256": lambda: hashlib.sha256(block),
        "blake2b": lambda: hashlib.blake2b(block),
    }
    for name, work in sums.items():
        taken = []
        for _ in range(3):
            begin = time.thread_time()
            work()
            taken.append(time.thread_time() - begin)
        print(f"  {name:8} {2**26 / 2**30 / min(taken):5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    print("checksums, GiB per second of a core:")
    checksums()
    place = parallel.start(ParallelConfig(), "cpu")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        largest = make(folder / "hf", given.gib)
        limit = 2 * largest / 2**20 + 256
        total = sum(f.stat().st_size for f in (folder / "hf").glob("*.safetensors"))
        print(f"{total / 2**30:.2f} GiB, largest tensor {largest / 2**20:.0f} MiB")
        convert.convert(convert.prepare(folder / "hf", folder / "torch_dist"), place)
        for source, target in (("hf", "torch_dist.new"), ("torch_dist", "hf.new")):
            report(folder / source, folder / target, place, given.rounds, limit)
    parallel.stop()


def report(source: Path, target: Path, place: parallel.Parallel, rounds: int, limit: float) -> None:
    """Measure cp and both kinds of conversion in turn, so that a busy machine hits all alike."""
    times: dict[str, list[tuple[float, float]]] = {"cp": [], "converted": [], "and verified": []}
    peak = 0.0

    def run(verify: bool) -> None:
        job = convert.prepare(source, target, verify=verify, quiet=True)
        convert.convert(job, place)

    copy = source.with_name("copy")
    for _ in range(rounds):
        times["cp"].append(seconds(lambda: run_cp(source, copy), copy))
        shutil.rmtree(copy)
        with Peak() as memory:
            times["converted"].append(seconds(lambda: run(False), target))
            times["and verified"].append(seconds(lambda: run(True), target))
        peak = max(peak, memory.mib)
        shutil.rmtree(target)
    print(f"{source.name} -> {target.name.removesuffix('.new')}")
    middle = {
        name: [median(kind) for kind in zip(*taken, strict=True)] for name, taken in times.items()
    }
    for name, (wall, busy) in middle.items():
        ratios = middle["cp"][0] / wall, middle["cp"][1] / busy
        print(
            f"  {name:13} {wall:6.2f} s wall {busy:6.2f} s processor   "
            f"{ratios[0]:.2f} x (wall) {ratios[1]:.2f} x (processor) the speed of cp"
            f"   target {SPEED}: {_judged(ratios[0] >= SPEED)}"
        )
    print(
        f"  memory        {peak:6.0f} MiB above start   at most {limit:.0f}: "
        f"{_judged(peak <= limit)}"
    )


def _judged(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
