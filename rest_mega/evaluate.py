"""`rest-mega eval`: held-out success of a checkpoint, without training."""

from __future__ import annotations

from rest_mega.assemble import Session, open_session, read_inputs
from rest_mega.config import RunConfig, require
from rest_mega.evaluation.held_out import evaluate
from rest_mega.rollout.engine import Sampling
from rest_mega.sync.publish import publish


def run(config: RunConfig) -> int:
    """Evaluate the newest checkpoint of the run directory, or `model.path` when it has none."""
    inputs = read_inputs(config, prompts=False)
    require(
        bool(inputs.held_out),
        "data.held_out is empty; name a JSONL or Parquet file of prompts to evaluate on",
    )
    session = open_session(config, inputs, total_steps=1, rollouts=True)
    try:
        step = int(session.resumed.get("step", 0))
        publish(session.exporter, session.engine, step)
        metrics = held_out(session)
        for name, value in metrics.items():
            session.reporter.event("evaluation", f"{name} {value:.4f}")
        return 0
    finally:
        session.close()


def held_out(session: Session) -> dict[str, float]:
    """Held-out metrics of the published parameters, sampled and (evaluation.greedy) greedy;
    collective."""
    config, inputs = session.config, session.inputs
    modes = {"sampled": Sampling(config.rollout.temperature)}
    if config.evaluation.greedy:
        modes["greedy"] = Sampling(greedy=True)
    return evaluate(
        session.place, session.collector, inputs.rubric, inputs.held_out, modes, config.run.seed
    )
