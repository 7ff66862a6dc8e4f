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
from rest_mega.trainer.checkpoint_files import newest
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
        specs = [one for one in prompt.tools if not isinstance(one, str)]
        ids = chat.prompt_ids(prompt.messages, specs)
        ids += [*tokenizer.encode(prompt.task["ground_truth"]), tokenizer.end_of_turn_ids[0]]
        zeros = np.zeros(len(ids), dtype=np.float32)
        samples.append(
            Sample(
                ids_T=np.array(ids, np.int32),
                mask_T=np.ones(len(ids), dtype=np.bool_),
                regions_T=zeros.astype(np.int8),
                logprobs_T=zeros,
                version_T=zeros.astype(np.int32),
                advantage=0.0,
            )
        )
    return samples


def resumed(config: RunConfig, place: parallel.Parallel) -> Trainer:
    """The trainer as the run's last checkpoint left it; scores at temperature 1."""
    found = newest(Path(config.run.dir))
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
    """Of every text the logits of this rank's part of the vocabulary, and the log-probs; of use on
    the last stage alone."""
    hidden: list[torch.Tensor] = []
    chunk = trainer.modules[-1]
    chunk.register_forward_hook(lambda module, given, out: hidden.append(out))
    parts = [trainer.pack([sample]) for sample in samples]  # one text a micro-batch
    scores = [trainer.score(part)[0][0] for part in parts]
    if not trainer.parallel.is_last_stage:
        return []
    weight_VD = head_weight(chunk)
    return [
        (states[:, 0] @ weight_VD.T, torch.from_numpy(score.logprob_R))
        for states, score in zip(hidden, scores, strict=True)
    ]


@torch.no_grad()
def reference(folder: str | Path, samples: list[Sample]) -> list[Predictions]:
    """All logits and the log-probs of every text by transformers on the checkpoint in `folder`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for sample in samples:
        ids = torch.from_numpy(sample.ids_T.astype(np.int64))
        logits_TV = model(ids[None]).logits[0, :-1]
        found.append((logits_TV, torch.log_softmax(logits_TV, -1).gather(1, ids[1:, None])[:, 0]))
    return found


def differences(
    ours: list[Predictions], theirs: list[Predictions], place: parallel.Parallel
) -> tuple[float, float]:
    """The largest difference of a logit and of a log-prob, over all ranks; every rank calls it."""
    largest = np.zeros(2)
    for (mine_TV, mine_T), (all_TV, all_T) in zip(ours, theirs, strict=True):
        logits_TV = all_TV[:, place.tensor_rank * mine_TV.shape[1] :][:, : mine_TV.shape[1]]
        gaps = (mine_TV[:, : logits_TV.shape[1]] - logits_TV, mine_T - all_T)  # no padding
        largest = np.maximum(largest, [float(gap.abs().max()) for gap in gaps])
    logits, logprobs = place.maximum(largest)
    return float(logits), float(logprobs)


def main() -> int:
    """Compare and print; returns the exit code."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    _, config = read(["train", *sys.argv[1:]])
    whole = not config.parallel.sequence and config.parallel.context == 1
    require(whole, "check.py needs whole sequences: parallel.sequence=false parallel.context=1")
    place = parallel.start(config.parallel, config.run.device)
    samples, exported = texts(config), Path(config.run.dir) / "hf"
    ours = own(resumed(config, place), samples)
    lines, good = [], False
    before = Path(config.model.path)  # transformers reads a Hugging Face folder alone
    for folder in (exported, *([before] if any(before.glob("*.safetensors")) else [])):
        theirs = reference(folder, samples) if ours else []
        largest = differences(ours, theirs, place)
        good = good or (folder == exported and max(largest) <= TOLERANCE)
        lines.append("{}: logits {:.1e}, log-probs {:.1e}".format(folder, *largest))
    if place.is_head:
        positions = sum(len(s.ids_T) - 1 for s in samples)
        print(f"max |trainer - transformers| over {positions} positions, bound {TOLERANCE:.0e}")
        print(f"  {lines[0]}", *(f"  {line} (before training)" for line in lines[1:]), sep="\n")
    parallel.stop()
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
