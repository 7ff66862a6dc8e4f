"""`rest-mega eval`: held-out success of a checkpoint, without training."""

from __future__ import annotations

import sys

from rest_mega.assemble import open_session, read_inputs
from rest_mega.config import RunConfig
from rest_mega.session import Inputs


def read(config: RunConfig) -> Inputs:
    """Everything that the evaluation reads, checked before the ranks meet."""
    return read_inputs(config, "eval")


def run(config: RunConfig, inputs: Inputs) -> int:
    """Evaluate the newest checkpoint of the run directory, or `model.path` when it has none.

    The metrics go to standard output, a line each; the run directory is read and left as it is.
    """
    with open_session(config, inputs, "eval", total_steps=1, rollouts=True) as session:
        session.publish(int(session.resumed.get("step", 0)))
        with session.phase("evaluate"):
            metrics = session.measure()
        if session.place.is_head:
            sys.stdout.write("".join(f"{name} {value:.4f}\n" for name, value in metrics.items()))
        return 0 if metrics else session.interrupted()
