"""The plan's pipeline beside the measured one.

    torchrun --nproc-per-node 2 benchmarks/pipeline.py [--virtual-pipeline 2] [--microbatches 8]

Every rank is a pipeline stage. megatron-core's own timers give the seconds of each pass of a step.
Printed is the step's pipeline, from the first pass of any rank to the end of the last, and beside
it, as shares of it, what the plan makes of these seconds:

- `passes`: the timeline (`planning.schedule`) with every pass at its own seconds. What it lacks is
  what lies between passes: sends and receives, megatron-core's own work.
- `means`: the timeline with one mean for each block of layers and direction, as a plan has it. What
  it lacks besides is what the passes' unevenness costs.
- `closed`: what `rest-mega plan` computes, micro-batches x the slowest stage, and the other stages
  once, over VPP.

Nothing is fitted, sends are taken as free. The bubble is the share in which the rank that waits
least runs no pass, measured and planned (`means`).

Give every rank a core of its own: where ranks share one, a pass lasts longer while others compute,
which no timeline of single passes can know. `--quiet 0.1` times only what happens while other
processes take at most a tenth of the host's cores (`host_load.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import host_load
from pass_times import PASSES, PassTimes
from train_step import SIZES, build, join, samples

from rest_mega import launch
from rest_mega.planning.schedule import makespan, makespan_of, order
from rest_mega.trainer import parallel as places
from rest_mega.trainer.trainer import Trainer

PREDICTIONS, BUBBLES = ("passes", "means", "closed"), ("bubble", "planned")


def step(trainer: Trainer, batches: list[Any], passes: PassTimes, offset: float) -> dict[str, Any]:
    """One optimizer step's figures. `offset`: how far this rank's clock is ahead of rank 0's."""
    place, chunks = trainer.parallel, len(trainer.modules)
    passes.begin()
    place.barrier()
    trainer.supervised_step(batches)
    found = passes.by_name()
    row = []
    for is_forward, name in zip((True, False), PASSES, strict=True):
        queue = order(place.pipeline_rank, place.config.pipeline, chunks, len(batches))
        mine = [(chunk, m) for forward, chunk, m in queue if forward == is_forward]
        for (chunk, m), (begin, end) in zip(mine, found[name], strict=True):
            block = chunk * place.config.pipeline + place.pipeline_rank
            row.append((is_forward, block, m, begin - offset, end - offset))
    rows = [json.loads(text) for text in place.gather_text(json.dumps(row))]
    return figures(rows, len(batches), chunks)


def figures(rows: list[list[Any]], microbatches: int, chunks: int) -> dict[str, Any]:
    """Of every stage's passes (is forward, block, micro-batch, begin, end): what was measured, and
    what is predicted of it."""
    everything = [one for row in rows for one in row]
    took = {(way, block, m): end - begin for way, block, m, begin, end in everything}
    seconds = max(one[4] for one in everything) - min(one[3] for one in everything)
    blocks = len(rows) * chunks

    def mean(way: bool, block: int) -> float:
        return statistics.mean(took[way, block, m] for m in range(microbatches))

    forward, backward = ([mean(way, b) for b in range(blocks)] for way in (True, False))
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    stages = [sum(both[p :: len(rows)]) for p in range(len(rows))]
    slowest = max(stages)
    means = makespan(forward, backward, microbatches, chunks)
    return {
        "forward": forward,
        "backward": backward,
        "seconds": seconds,
        "passes": makespan_of(lambda *one: took[one], len(rows), microbatches, chunks) / seconds,
        "means": means / seconds,
        "closed": (microbatches * slowest + (sum(stages) - slowest) / chunks) / seconds,
        "bubble": 1 - microbatches * slowest / seconds,
        "planned": 1 - microbatches * slowest / means,
    }


def arguments() -> argparse.Namespace:
    """The command line; what `train_step.build` needs besides has one value here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--virtual-pipeline", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--trained", type=float, default=0.5, help="share of trained tokens")
    parser.add_argument("--steps", type=int, default=5, help="timed, after one that is not")
    host_load.add_options(parser)
    parser.set_defaults(
        model="", layers="auto", recompute="none", spread=0.0, tensor=1, context=1, expert=1,
        sequence=False, distributed=False,
    )  # fmt: skip
    args = parser.parse_args()
    args.samples = args.microbatches * (args.tokens // (args.length - 1))
    args.pipeline = launch.world_size()
    return args


def main() -> None:
    """Print a line per step, then the medians."""
    args = arguments()
    place = join(args)
    on_gpu = place.device.type == "cuda"
    trainer, passes = build(args, place, "bf16" if on_gpu else "fp32"), PassTimes(on_gpu)
    trainer.time_pieces(passes)
    offset = place.clock_offset()
    (batches,) = trainer.pack(samples(args, trainer.architecture.vocab_size, 0))
    quietly = host_load.Quiet(place, args.quiet, args.patience)
    timed = []
    for number in range(args.steps + 1):
        one, others = quietly(lambda: step(trainer, batches, passes, offset))
        timed += [one] if number else []
        if place.is_head:
            told = f"step {number}" if number else "warm-up"
            print(f"{told}: {line(one)}; others {others:.0%} of the cores", flush=True)
    if place.is_head:
        middle = {name: median(timed, name) for name in (*PREDICTIONS, "seconds", *BUBBLES)}
        ways = zip(median(timed, "forward"), median(timed, "backward"), strict=True)
        blocks = ", ".join(f"{1e3 * f:.0f} + {1e3 * b:.0f}" for f, b in ways)
        print(f"{len(batches)} micro-batches; ms of each block, forward + backward: {blocks}")
        print(f"median: {line(middle)}")
    places.stop()


def median(timed: list[dict[str, Any]], name: str) -> Any:
    """Of a figure over the steps; of each of its parts where it is a list."""
    values = [one[name] for one in timed]
    if isinstance(values[0], list):
        return [statistics.median(parts) for parts in zip(*values, strict=True)]
    return statistics.median(values)


def line(one: dict[str, Any]) -> str:
    """What was measured, and what the plan says."""
    shares = ", ".join(f"{name} {one[name]:.3f}" for name in PREDICTIONS)
    return (
        f"{one['seconds']:.2f} s; predicted: {shares}; bubble {one['bubble']:.1%}, "
        f"predicted {one['planned']:.1%}"
    )


if __name__ == "__main__":
    main()
