"""The plan of a config, or of the layouts for a number of GPUs, as a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rest_mega.config import RunConfig
from rest_mega.planning.estimate import Plan, plan
from rest_mega.planning.gpus import GPUS, MATMUL_SHARE
from rest_mega.planning.layouts import limit, propose
from rest_mega.trainer.model import read_architecture


def main(config: RunConfig, gpu: str, gpus: int | None, ranks: int | None) -> int:
    """Print the config's own layout on `ranks` GPUs (None: the fewest), or with `gpus` the best
    layouts for that many; 1 if none fits."""
    a = read_architecture(config.model.path)
    if gpus is None:
        made = plan(config, a, gpu, ranks)
        sys.stdout.write("\n".join([*_head(made), *_detail(made)]) + "\n")
        return 0 if made.fits else 1
    if gpu not in GPUS:
        plan(config, a, gpu, gpus)  # tells the known ones
    best, refused = propose(config, a, GPUS[gpu], gpus)
    if not best:
        sys.stdout.write(f"no layout divides the model on {gpus} GPUs: refused {refused}\n")
        return 1
    sys.stdout.write("\n".join([*_head(best[0]), *table(best), f"refused: {refused or 'none'}"]))
    sys.stdout.write("\n\nthe first of them:\n" + "\n".join(_detail(best[0])) + "\n")
    return 0 if best[0].fits else 1


def table(plans: Sequence[Plan]) -> list[str]:
    """One line per layout."""
    head = "   TP   PP  VPP   CP   EP   DP tokens recompute  memory fits bubble   MFU"
    lines = [f"{head} tokens/s step s  limit"]
    for made in plans:
        s = made.config.parallel
        lines.append(
            f"{s.tensor:5}{s.pipeline:5}{s.virtual_pipeline:5}{s.context:5}{s.expert:5}"
            f"{made.batch.replicas:5}{made.config.packing.tokens:7} {made.config.model.recompute:9}"
            f"{_gb(made.phases[0].need):>8} {'yes' if made.fits else 'no':>4}"
            f"{made.bubble:7.1%}{made.mfu:6.1%}{made.tokens_per_second:9,.0f}"
            f"{made.step_seconds:7.1f}  {limit(made)}"
        )
    return lines


def _head(made: Plan) -> list[str]:
    batch, rollout = made.batch, made.config.rollout
    return [
        f"{made.parameters / 1e9:.2f} B parameters on {made.gpus} x {made.gpu.name}; "
        f"{MATMUL_SHARE:.0%} of peak assumed inside a rank, trajectories at their longest",
        f"batch: {rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples = "
        f"{batch.trajectories} trajectories -> {batch.optimizer_steps} optimizer steps x "
        f"{batch.replicas} replicas x {batch.microbatches} micro-batches of "
        f"{made.config.packing.tokens} tokens",
    ]


def _detail(made: Plan) -> list[str]:
    lines = ["stage parameters gradients optimizer activations    head   total"]
    shown = {made.stages[0], made.memory, made.stages[-1]}
    for m in sorted(shown, key=lambda one: one.stage):
        worst = f"  <- fullest, of {_gb(made.room)}" if m is made.memory else ""
        lines.append(
            f"{m.stage:5}{_gb(m.parameters):>11}{_gb(m.gradients):>10}{_gb(m.optimizer):>10}"
            f"{_gb(m.activations):>12}{_gb(m.head):>8}{_gb(m.total):>8}{worst}"
        )
    sent = ", ".join(f"{k} {_gb(v)}" for k, v in made.traffic.items() if v)
    phases = ", ".join(f"{name} {value:.2f}" for name, value in made.seconds.items())
    return [
        *lines,
        f"sent by a rank in a step: {sent}",
        f"seconds: {phases}; step {made.step_seconds:.2f}",
        f"bubble {made.bubble:.1%}, MFU {made.mfu:.1%}, {made.tokens_per_second:,.0f} tokens/s in "
        f"training; limited by {limit(made)}",
        _kept(made),
        *_sampling(made),
        _verdict(made),
    ]


def _sampling(made: Plan) -> list[str]:
    """The engine, in one line."""
    e = made.engine
    if e.placement == "none":
        return []
    kind = {
        "colocated": "on the trainer's GPUs",
        "apart": "on GPUs of its own",
        "embedded": "in the trainer's processes",
    }[e.placement]
    size = f"{e.servers} x {e.gpus} GPU{'s' * (e.gpus > 1)}"
    return [
        f"engine: {size} {kind}; {e.share:.0%} of the {_gb(e.free)} left to it: weights "
        f"{_gb(e.weights)}, cache {_gb(e.cache)} at {e.token / 1e3:.1f}K a token: {e.sequences} "
        f"sequences of {e.length} tokens at once"
    ]


def _verdict(made: Plan) -> str:
    """Which phase is tightest, and whether it fits."""
    tightest = made.phases[0]
    needs = ", ".join(f"{phase.name} {_gb(phase.need)}" for phase in made.phases)
    if made.fits:
        return f"needs at least, of {_gb(made.room)}: {needs}; fits"
    return f"needs at least, of {_gb(made.room)}: {needs}; DOES NOT FIT in {tightest.name}: " + (
        tightest.remedy
    )


def _kept(made: Plan) -> str:
    stored, copies = made.storage, ""
    if stored.copies:
        copies = f", {stored.copies} copies of that for the engine"
    return (
        f"run.dir: a checkpoint {_gb(stored.checkpoint)}, {stored.checkpoints} while one is saved; "
        f"an export {_gb(stored.export)}, {stored.exports} in all{copies}; "
        f"together {_gb(stored.total)}"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}G"
