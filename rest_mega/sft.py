"""`rest-mega sft`: supervised warm start on chat dialogues, with the trainer that RL uses."""

from __future__ import annotations

import functools

import numpy as np

from rest_mega.assemble import open_session, read_inputs
from rest_mega.config import ConfigError, RunConfig, require
from rest_mega.data.prompts import load_dialogues
from rest_mega.evaluation.split import check_dialogues
from rest_mega.records import Sample
from rest_mega.session import Inputs, Session


def read(config: RunConfig) -> tuple[Inputs, list[Sample]]:
    """Everything that the run reads, checked before the ranks meet."""
    inputs = read_inputs(config, "sft")
    return inputs, read_samples(config, inputs)


def run(config: RunConfig, read: tuple[Inputs, list[Sample]]) -> int:
    """Train on the assistant turns of `sft.data` for `run.steps` steps; evaluates at the end if
    prompts are given."""
    inputs, samples = read
    total, rollouts = config.run.steps, inputs.evaluated
    with open_session(config, inputs, "sft", total_steps=total, rollouts=rollouts) as session:
        return _loop(session, samples)


def read_samples(config: RunConfig, inputs: Inputs) -> list[Sample]:
    """Every dialogue of `sft.data` as ids and mask; ConfigError for one that does not fit into a
    micro-batch, or holds what is evaluated."""
    require(bool(config.sft.data), "sft.data is empty; name a JSONL file of chat dialogues")
    dialogues = load_dialogues(config.sft.data)
    named = ((f"{config.sft.data}: dialogue {n}", m) for n, (m, _) in enumerate(dialogues, start=1))
    check_dialogues(named, inputs.held_out, inputs.benchmarks)
    samples = []
    for number, (messages, tools) in enumerate(dialogues, start=1):
        try:
            ids, mask = inputs.chat.dialogue_ids(messages, tools)
        except ConfigError as error:
            raise ConfigError(f"{config.sft.data}: dialogue {number}: {error}") from error
        if len(ids) - 1 > config.packing.tokens:
            raise ConfigError(
                f"{config.sft.data}: dialogue {number} has {len(ids)} tokens, packing.tokens is "
                f"{config.packing.tokens}: raise packing.tokens or shorten the dialogue"
            )
        length = len(ids)
        samples.append(
            Sample(
                ids_T=np.array(ids, dtype=np.int32),
                mask_T=np.array(mask, dtype=np.bool_),
                regions_T=np.zeros(length, dtype=np.int8),
                logprobs_T=np.zeros(length, dtype=np.float32),
                version_T=np.full(length, -1, dtype=np.int32),
                advantage=0.0,
            )
        )
    return samples


def step_indices(count: int, config: RunConfig, step: int) -> list[int]:
    """Dialogues of 1-based `step`: in file order, or in an order drawn anew for every epoch."""
    size = config.sft.dialogues_per_step
    chosen = []
    for position in range((step - 1) * size, step * size):
        epoch, index = divmod(position, count)
        chosen.append(_order(count, config.run.seed, epoch)[index] if config.sft.shuffle else index)
    return chosen


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return [int(i) for i in np.random.default_rng((seed, epoch)).permutation(count)]


def _loop(s: Session, samples: list[Sample]) -> int:
    config, place, step = s.config, s.place, int(s.resumed.get("step", 0))
    s.announce(step)
    while step < config.run.last_step:
        if place.sum_one(s.stop()) > 0:
            return s.interrupt(step)
        step += 1
        mine = step_indices(len(samples), config, step)[place.data_rank :: place.data_size]
        with s.phase("train"):
            result = s.trainer.supervised_step(s.trainer.pack([samples[i] for i in mine])[0])
        metrics = {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": result.lr,
        }
        s.reporter.step(step, metrics)
        if not s.evaluate(step, first=False):
            return s.interrupt(step)
        s.save_where_due(step)
    return s.finish()
