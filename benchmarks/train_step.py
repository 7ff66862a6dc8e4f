"""Speed, memory and bubble of a ResT step without its rollouts: score, weigh, train.

    python benchmarks/train_step.py [--size tiny] [--layers local] [--steps 3] [--json FILE]
    torchrun --nproc-per-node 8 benchmarks/train_step.py --size qwen3-8b --tensor 2 --pipeline 2

Weights are random, trajectories made up (lengths lognormal, clipped to half and twice the mean, or
all alike with `--spread 0`; the later `--trained` share of each is trained). Prints, per step:
seconds of the two phases (all ranks begin them together, the slowest rank's time counts, and they
end with a host synchronisation), tokens per second of all ranks, model FLOP/s per rank (2 x
parameters of the matmuls per token for scoring, 6 x for training, attention's causal half added;
recomputation is not counted; Narayanan et al., arXiv 2104.04473, appendix), the bubble of training
(`pass_times.waiting`, of the rank that waits least) and the highest memory of any rank. With
`--peak TFLOPS` also the share of a device's peak (MFU): 989 for bf16 on H100 and H200 SXM (NVIDIA's
datasheets, dense).

`--json FILE` writes one object: what was run, medians over the timed steps, every rank's bubble,
idle share and memory. `--speed` adds what the device does in large pieces (`device_speed.py`), the
mean of before and after. `--quiet 0.1` times only what happens while other processes take at most a
tenth of the host's cores, and waits for it (`host_load.py`; all ranks on one host).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import device_speed
import host_load
import numpy as np
import peak_memory
import torch
from pass_times import PassTimes, waiting

from rest_mega.config import (
    CreditConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ParallelConfig,
)
from rest_mega.credit import weights as credit
from rest_mega.dialects.reply import Region
from rest_mega.planning.parameters import active_in_layer
from rest_mega.records import Sample
from rest_mega.sync.load import load, open_source
from rest_mega.trainer import parallel as places
from rest_mega.trainer.model import Architecture, read_architecture
from rest_mega.trainer.parallel import Parallel
from rest_mega.trainer.trainer import Trainer

REGIONS = len(Region)
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128,
         "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151_936,
         "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40_960}  # fmt: skip
SIZES: dict[str, dict[str, object]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 32,
             "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096,
             "tie_word_embeddings": True},
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "tie_word_embeddings": True},
    "qwen3-1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                   "tie_word_embeddings": True},
    "qwen3-4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": True},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip
"""The published sizes of Qwen3 (Hugging Face, config.json), and one for a laptop."""


def samples(args: argparse.Namespace, vocab: int, seed: int) -> list[Sample]:
    """Made-up trajectories of `args.length` tokens on average."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(args.samples):
        drawn = args.length * rng.lognormal(-(args.spread**2) / 2, args.spread)
        length = int(np.clip(drawn, args.length / 2, args.length * 2))
        trained = np.arange(length) >= length - round(args.trained * length)
        made.append(
            Sample(
                ids_T=rng.integers(0, vocab, length).astype(np.int32),
                mask_T=trained,
                regions_T=rng.integers(0, REGIONS, length).astype(np.int8),
                logprobs_T=np.where(trained, -np.log(vocab), 0).astype(np.float32),
                version_T=np.where(trained, 0, -1).astype(np.int32),
                advantage=float(rng.normal()),
                group=number,
            )
        )
    return made


def forward_flops(one: Architecture, lengths: list[int], trained: int) -> float:
    """Of one forward pass over all tokens of a replica."""
    layers = 2.0 * sum(active_in_layer(one, i) for i in range(one.layers))
    causal = sum(2.0 * one.layers * one.heads * one.head_dim * n * n for n in lengths)
    head = 2.0 * trained * one.hidden * one.vocab_size
    return layers * sum(lengths) + causal + head


def step(trainer: Trainer, made: list[Sample], passes: PassTimes, offset: float) -> dict[str, Any]:
    """Seconds of scoring, of weighing and of training, each the slowest rank's, and every rank's
    bubble and idle share while it trains."""
    place = trainer.parallel
    (batches,) = trainer.pack(made)
    times = [_together(place)]
    (scores,) = trainer.score([batches])
    times.append(time.perf_counter())
    sums_K, counts_K = trainer.rows.region_sums([batches], [scores], REGIONS)
    means_K = np.asarray(sums_K) / np.maximum(counts_K, 1)
    raw_K = credit.region_weights(CreditConfig(), means_K, progress=0.5, step=1)
    weights = [credit.normalise(raw_K, b.regions_T, b.mask_T, b.sample_T) for b in batches]
    times.append(time.perf_counter())
    passes.begin()
    times.append(_together(place))
    trainer.step(batches, scores, weights)
    times.append(time.perf_counter())
    score, weigh, _, train = place.maximum(np.diff(times)).tolist()
    return {
        "score": score,
        "weigh": weigh,
        "train": train,
        "microbatches": len(batches),
        "ranks": waiting(place, passes, offset, train),
    }


def _together(place: Parallel) -> float:
    place.barrier()
    return time.perf_counter()


def architecture(args: argparse.Namespace, folder: Path) -> Architecture:
    """Of `--model`, or of `--size`, whose config.json is written into `folder`."""
    if args.model:
        return read_architecture(args.model, "--model")
    (folder / "config.json").write_text(json.dumps({**QWEN3, **SIZES[args.size]}))
    return read_architecture(str(folder))


def join(args: argparse.Namespace) -> Parallel:
    """This rank's place at the layout asked for."""
    sizes = ParallelConfig(
        tensor=args.tensor,
        pipeline=args.pipeline,
        virtual_pipeline=args.virtual_pipeline,
        context=args.context,
        expert=args.expert,
        sequence=args.tensor > 1 and args.sequence,
    )
    return places.start(sizes, "auto")


def build(args: argparse.Namespace, place: Parallel, dtype: str) -> Trainer:
    """A trainer with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        one = architecture(args, Path(folder))
        trainer = Trainer(
            one,
            place,
            model=ModelConfig(dtype=dtype, layers=args.layers, recompute=args.recompute),
            optimizer=OptimizerConfig(lr=1e-6, distributed=args.distributed),
            loss=LossConfig(),
            packing=PackingConfig(tokens=args.tokens),
            temperature=1.0,
            total_steps=100,
        )
        source = open_source(args.model or folder, "random", one, 0)
        load(trainer.modules, source, one, place)
    trainer.prepare()
    return trainer


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--model", default="", help="folder of a config.json, instead of --size")
    parser.add_argument("--samples", type=int, default=16, help="of each replica")
    parser.add_argument("--length", type=int, default=512, help="mean tokens of a trajectory")
    parser.add_argument("--spread", type=float, default=0.4, help="of log lengths; 0: all alike")
    parser.add_argument("--trained", type=float, default=0.5, help="share of trained tokens")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--layers", choices=("auto", "te", "local"), default="auto")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    for name in ("tensor", "pipeline", "virtual-pipeline", "context", "expert"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--sequence", action="store_true", help="sequence parallelism")
    parser.add_argument("--distributed", action="store_true", help="distributed optimizer")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of one device")
    parser.add_argument("--speed", action="store_true", help="measure the device as well")
    host_load.add_options(parser)
    parser.add_argument("--json", type=Path, help="file of the result")
    return parser.parse_args()


def main() -> None:
    """Print a line per step."""
    args = arguments()
    place = join(args)
    on_gpu = place.device.type == "cuda"
    dtype = "bf16" if on_gpu else "fp32"
    kind = torch.bfloat16 if on_gpu else torch.float32
    quietly = host_load.Quiet(place, args.quiet, args.patience)

    def look() -> list[dict[str, float]]:
        return [quietly(lambda: device_speed.measure(place, kind))[0]] if args.speed else []

    speeds = look()
    before = 0 if on_gpu else peak_memory.forget()
    trainer, passes = build(args, place, dtype), PassTimes(on_gpu)
    trainer.time_pieces(passes)
    offset = place.clock_offset()
    made = samples(args, trainer.architecture.vocab_size, place.data_rank)
    lengths = [len(s.ids_T) for s in made]
    flops = forward_flops(trainer.architecture, lengths, sum(s.trained_tokens for s in made))
    share = place.counts_tokens / args.context
    tokens, flops = place.sum(np.array([sum(lengths), flops]) * share).tolist()
    timed = []
    for number in range(args.steps + 1):
        one, others = quietly(lambda: step(trainer, made, passes, offset))
        memory = [json.loads(m) for m in place.gather_text(str(peak_memory.peak(on_gpu) - before))]
        seconds = one["score"] + one["weigh"] + one["train"]
        rate = 4 * flops / seconds / place.world_size / 1e12
        line = f"step {number}: score {one['score']:.3f} s, train {one['train']:.3f} s, "
        line += f"{tokens / seconds:,.0f} tokens/s, {rate:.3g} TFLOP/s per rank"
        line += f" ({rate / args.peak:.1%} of peak)" if args.peak else ""
        line += f", bubble {min(rank['bubble'] for rank in one['ranks']):.1%}"
        if place.rank == 0:
            print(f"{line}, memory {max(memory) / 2**30:.2f} GiB", flush=True)
        timed += [one | {"others": others}] if number else []
    speeds += look()  # a device's speed changes: before and after
    if args.json and place.rank == 0:
        what = {key: value for key, value in vars(args).items() if key != "json"}
        what |= {"ranks": place.world_size, "replicas": place.data_size, "dtype": dtype}
        made_of = result(timed, tokens, flops, place.world_size, args.peak)
        text = {"run": what, **made_of, "memory": memory, "speed": device_speed.mean(speeds)}
        text["memory_kind"] = "allocated on the GPU" if on_gpu else "resident, less before build"
        args.json.write_text(json.dumps(text, indent=1) + "\n")
    places.stop()


def result(
    timed: list[dict[str, Any]], tokens: float, flops: float, ranks: int, peak: float
) -> dict[str, Any]:
    """Medians over the timed steps; `flops`: of one forward pass over all `tokens`. Per second and
    MFU are of training, `step_...` of scoring, weighing and training together."""
    seconds = {
        name: statistics.median(one[name] for one in timed) for name in ("score", "weigh", "train")
    }
    whole = sum(seconds.values())
    rates = {
        "tokens_per_second": tokens / seconds["train"],
        "step_tokens_per_second": tokens / whole,
        "tflops_per_rank": 3 * flops / seconds["train"] / ranks / 1e12,
        "step_tflops_per_rank": 4 * flops / whole / ranks / 1e12,
    }
    of_rank = {
        name: [statistics.median(one["ranks"][r][name] for one in timed) for r in range(ranks)]
        for name in ("bubble", "idle")
    }
    return {
        "tokens": tokens,
        "microbatches": timed[0]["microbatches"],
        "seconds": seconds,
        "train_seconds": [one["train"] for one in timed],
        **rates,
        "others": statistics.mean(one["others"] for one in timed),
        "mfu": rates["tflops_per_rank"] / peak if peak else None,
        "bubble": min(of_rank["bubble"]),
        "rank_bubble": of_rank["bubble"],
        "rank_idle": of_rank["idle"],
    }


if __name__ == "__main__":
    main()
