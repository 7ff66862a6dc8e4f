"""Speed and memory of a ResT step without its rollouts: score, weigh, train.

    python benchmarks/train_step.py [--size tiny] [--layers local] [--steps 3]
    torchrun --nproc-per-node 8 benchmarks/train_step.py --size qwen3-8b --tensor 2 --pipeline 2

Weights are random, trajectories made up (lengths lognormal, clipped to half and twice the mean; the
later half of each is trained). Prints, per step: seconds of the two phases (they end with a host
synchronisation), tokens per second of all ranks, model FLOP/s per rank (2 x parameters of the
matmuls per token for scoring, 6 x for training, attention's causal half added; recomputation is not
counted; Narayanan et al., arXiv 2104.04473, appendix) and the highest memory of rank 0. With
`--peak TFLOPS` also the share of a device's peak (MFU): 989 for bf16 on H100 and H200 SXM (NVIDIA's
datasheets, dense).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

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
from rest_mega.records import Sample
from rest_mega.sync.load import load, open_source
from rest_mega.trainer import parallel as places
from rest_mega.trainer.device import peak_memory_bytes
from rest_mega.trainer.model import Architecture, read_architecture
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


def samples(count: int, mean: int, vocab: int, seed: int) -> list[Sample]:
    """Made-up trajectories of `mean` tokens on average."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(np.clip(mean * rng.lognormal(-0.08, 0.4), mean / 2, mean * 2))
        trained = np.arange(length) >= length // 2
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


def flops_per_step(one: Architecture, lengths: list[int], trained: int) -> float:
    """Of scoring and training together, over all ranks' tokens."""
    attention = one.hidden * one.head_dim * 2 * (one.heads + one.kv_heads)
    layers = one.layers * (attention + 3 * one.hidden * one.ffn)
    causal = sum(2 * one.layers * one.heads * one.head_dim * n * n for n in lengths)
    head = 2 * trained * one.hidden * one.vocab_size
    return 4.0 * (2 * layers * sum(lengths) + causal + head)


def step(trainer: Trainer, made: list[Sample]) -> tuple[float, float]:
    """Seconds of scoring and of weighing and training."""
    start = time.perf_counter()
    (batches,) = trainer.pack(made)
    (scores,) = trainer.score([batches])
    scored = time.perf_counter()
    sums_K, counts_K = trainer.rows.region_sums([batches], [scores], REGIONS)
    means_K = np.asarray(sums_K) / np.maximum(counts_K, 1)
    raw_K = credit.region_weights(CreditConfig(), means_K, progress=0.5, step=1)
    weights = [credit.normalise(raw_K, b.regions_T, b.mask_T, b.sample_T) for b in batches]
    trainer.step(batches, scores, weights)
    return scored - start, time.perf_counter() - scored


def build(args: argparse.Namespace) -> Trainer:
    """A trainer with random weights at the layout asked for."""
    place = places.start(
        ParallelConfig(
            tensor=args.tensor,
            pipeline=args.pipeline,
            context=args.context,
            sequence=args.tensor > 1 and args.sequence,
        ),
        "auto",
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({**QWEN3, **SIZES[args.size]}))
        architecture = read_architecture(folder)
        dtype = "bf16" if place.device.type == "cuda" else "fp32"
        trainer = Trainer(
            architecture,
            place,
            model=ModelConfig(dtype=dtype, layers=args.layers, recompute=args.recompute),
            optimizer=OptimizerConfig(lr=1e-6, distributed=args.distributed),
            loss=LossConfig(),
            packing=PackingConfig(tokens=args.tokens),
            temperature=1.0,
            total_steps=100,
        )
        load(trainer.modules, open_source(folder, "random", architecture, 0), architecture, place)
    trainer.prepare()
    return trainer


def main() -> None:
    """Print a line per step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--samples", type=int, default=16, help="of each replica")
    parser.add_argument("--length", type=int, default=512, help="mean tokens of a trajectory")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--layers", choices=("auto", "te", "local"), default="auto")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    for name in ("tensor", "pipeline", "context"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--sequence", action="store_true", help="sequence parallelism")
    parser.add_argument("--distributed", action="store_true", help="distributed optimizer")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of one device")
    args = parser.parse_args()
    trainer = build(args)
    place, one = trainer.parallel, trainer.architecture
    made = samples(args.samples, args.length, one.vocab_size, place.data_rank)
    lengths = [len(s.ids_T) for s in made]
    flops = flops_per_step(one, lengths, sum(s.trained_tokens for s in made))
    share = place.counts_tokens / args.context
    tokens, flops = place.sum(np.array([sum(lengths), flops]) * share).tolist()
    for number in range(args.steps + 1):
        score, train = step(trainer, made)
        speed = flops / (score + train) / place.world_size / 1e12
        line = f"step {number}: score {score:.3f} s, train {train:.3f} s, "
        line += f"{tokens / (score + train):,.0f} tokens/s, {speed:.3g} TFLOP/s per rank"
        line += f" ({speed / args.peak:.1%} of peak)" if args.peak else ""
        if place.rank == 0:
            print(f"{line}, memory {peak_memory_bytes() / 2**30:.2f} GiB", flush=True)
    places.stop()


if __name__ == "__main__":
    main()
