"""The trained policy in the trainer = the exported folder in transformers, to 1e-4.

    torchrun --standalone --nproc-per-node 2 examples/smollm2_135m/check.py \\
        examples/smollm2_135m/config.yaml [section.key=value ...]

Loads the run's newest checkpoint into the trainer at the config's own layout, scores the first
prompts with their gold replies, and compares every logit and every log-prob with those of
transformers on RUN/hf. The exit code is 1 where they differ by more. The model from before the
training is compared too, to show how large a difference the steps make.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rest_mega.cli import read
from rest_mega.config import RunConfig, require
from rest_mega.data.chat import ChatFormat
from rest_mega.data.prompts import load_prompts
from rest_mega.data.tokenizer import load_tokenizer
from rest_mega.records import Sample
from rest_mega.sync.load import load, open_source
from rest_mega.trainer import checkpoint, parallel
from rest_mega.trainer.model import head_weight, read_architecture
from rest_mega.trainer.trainer import Trainer

TOLERANCE = 1e-4
PROMPTS = 3

Predictions = tuple[torch.Tensor, torch.Tensor]
"""(logits_TV, logprob_T)"""


def texts(config: RunConfig) -> list[Sample]:
    """The first prompts with their gold replies; every token but the first is scored."""
    tokenizer = load_tokenizer(
        config.tokenizer.path or config.model.path, config.tokenizer.chat_template
    )
    chat = ChatFormat(tokenizer)
    samples = []
    for prompt in load_prompts(config.data.train, config.data.system)[:PROMPTS]:
        ids = chat.prompt_ids(prompt.messages, prompt.tools)
        ids += [*tokenizer.encode(prompt.task["ground_truth"]), tokenizer.end_of_turn_ids[0]]
        zeros = np.zeros(len(ids), dtype=np.float32)
        everywhere = np.ones(len(ids), dtype=np.bool_)
        samples.append(
            Sample(np.array(ids, np.int32), everywhere, zeros.astype(np.int8), zeros, 0.0)
        )
    return samples


def resumed(config: RunConfig, place: parallel.Parallel) -> Trainer:
    """The trainer as the run's last checkpoint left it; scores at temperature 1."""
    found = checkpoint.newest(Path(config.run.dir))
    require(found is not None, f"{config.run.dir} holds no checkpoint; train first")
    architecture = read_architecture(config.model.path)
    trainer = Trainer(
        architecture,
        place,
        model=config.model,
        optimizer=config.optimizer,
        loss=config.loss,
        packing=config.packing,
        temperature=1.0,
        total_steps=config.run.steps,
    )
    source = open_source(config.model.path, config.model.init, architecture, config.run.seed)
    load(trainer.modules, source, architecture, place)
    trainer.prepare()
    assert found is not None
    checkpoint.load(trainer, found)
    return trainer


@torch.no_grad()
def own(trainer: Trainer, samples: list[Sample]) -> list[Predictions]:
    """The trainer's (logits_TV, logprob_T) of every text; of use on the last stage alone."""
    hidden: list[torch.Tensor] = []
    chunk = trainer.modules[-1]
    chunk.register_forward_hook(lambda module, given, out: hidden.append(out))
    parts = [trainer.pack([sample]) for sample in samples]  # one text a micro-batch
    scores = [trainer.score(part)[0][0] for part in parts]
    if not trainer.parallel.is_last_stage:
        return []
    weight_VD = head_weight(chunk)[: trainer.architecture.vocab_size]
    return [
        (states[:, 0] @ weight_VD.T, torch.from_numpy(score.logprob_R))
        for states, score in zip(hidden, scores, strict=True)
    ]


@torch.no_grad()
def reference(folder: str | Path, samples: list[Sample]) -> list[Predictions]:
    """The same of the checkpoint in `folder`, by transformers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for sample in samples:
        ids = torch.from_numpy(sample.ids_T.astype(np.int64))
        logits_TV = model(ids[None]).logits[0, :-1]
        found.append((logits_TV, torch.log_softmax(logits_TV, -1).gather(1, ids[1:, None])[:, 0]))
    return found


def differences(ours: list[Predictions], theirs: list[Predictions]) -> dict[str, float]:
    """The largest difference of a logit and of a log-prob."""
    largest = [
        max(float((a - b).abs().max()) for a, b in zip(x, y, strict=True))
        for x, y in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    ]
    return dict(zip(("logits", "log-probs"), largest, strict=True))


def main() -> int:
    """Compare and print; returns the exit code."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    _, config = read(["train", *sys.argv[1:]])
    place = parallel.start(config.parallel, config.run.device)
    samples, exported = texts(config), Path(config.run.dir) / "hf"
    ours = own(resumed(config, place), samples)
    good = True
    if ours:
        positions = sum(len(s.ids_T) - 1 for s in samples)
        print(f"max |trainer - transformers| over {positions} positions, bound {TOLERANCE:.0e}")
        for folder in (exported, config.model.path):
            found = differences(ours, reference(folder, samples))
            if folder == exported:
                good = max(found.values()) <= TOLERANCE
            shown = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
            print(f"  {folder}: {shown}" + " (before training)" * (folder != exported))
    bad = place.sum_one(not good)
    parallel.stop()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
