"""`rest-mega sft` on OpenAI's chat rows: which tokens are trained, and that the loss is theirs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rest_mega.assemble import read_inputs
from rest_mega.config import RunConfig
from rest_mega.data.tokenizer import Tokenizer
from rest_mega.records import Sample
from rest_mega.sft import read_samples
from tests.support.runs import Run, make_run, start

pytestmark = pytest.mark.distributed

CHAT = Path(__file__).parents[2] / "examples" / "sft" / "chat.jsonl"
ROWS = [json.loads(line) for line in CHAT.read_text("utf-8").splitlines()]
TURN = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
WORDS = ("data.held_out=", "run.export=false", "run.save_every=0", "packing.tokens=4096")


@dataclass(frozen=True)
class Read:
    """The example's dialogues as the verb reads them, in a tiny run."""

    run: Run
    tokenizer: Tokenizer
    samples: list[Sample]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """A tiny run whose sft.data is the example's file."""
    run = make_run(tmp_path_factory.mktemp("sft"))
    tree: dict[str, Any] = json.loads(run.config.read_text())
    tree["sft"]["data"], tree["data"]["held_out"] = str(CHAT), ""
    tree["packing"]["tokens"] = 4096
    config = RunConfig.from_dict(tree)
    inputs = read_inputs(config, "sft")
    return Read(run, inputs.tokenizer, read_samples(config, inputs))


def test_the_assistants_tokens_alone_are_trained(read: Read) -> None:
    """All that stands between the assistant's headers and its end-of-turn tokens, but for what
    OpenAI's weight 0 leaves out."""
    for row, sample in zip(ROWS, read.samples, strict=True):
        whole = read.tokenizer.decode([int(i) for i in sample.ids_T])
        turns = TURN.findall(whole)
        said = [m for m in row["messages"] if m["role"] == "assistant"]
        assert len(turns) == len(said)
        want = "".join(t for t, m in zip(turns, said, strict=True) if m.get("weight", 1))
        assert read.tokenizer.decode([int(i) for i in sample.ids_T[sample.mask_T]]) == want


def test_calls_are_written_as_the_model_will_have_to_write_them(read: Read) -> None:
    """OpenAI's arguments are JSON in a string; a template that writes JSON would quote it again."""
    text = read.tokenizer.decode([int(i) for i in read.samples[2].ids_T])
    calls = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text.split("<|im_start|>user")[1])
    wanted = [{"name": "get", "arguments": {"item": item}} for item in ("nut", "bolt")]
    assert [json.loads(call) for call in calls] == wanted


def test_the_first_loss_is_the_cross_entropy_of_those_tokens(read: Read, tmp_path: Path) -> None:
    """Packed into one micro-batch here, one dialogue at a time in transformers; three ways to
    spread them over micro-batches and replicas give the same."""
    want = cross_entropy(read)
    words = ("sft", read.run.config, f"sft.data={CHAT}", "run.steps=2", "sft.dialogues_per_step=6")
    losses = []
    for number, (world, *more) in enumerate([(1,), (1, "packing.tokens=700"), (2,)]):
        folder = tmp_path / str(number)
        ended = start(world, *words, *WORDS, f"run.dir={folder}", *more)
        assert [one.code for one in ended] == [0] * world, ended[0].err
        losses.append([row["train/loss"] for row in read.run.rows(folder=folder)])
    assert [first for first, _ in losses] == pytest.approx([want] * 3, rel=1e-5)
    assert all(second < first for first, second in losses)


def cross_entropy(read: Read) -> float:
    """The mean over all trained tokens of -log p under transformers' model."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(read.run.root / "model", dtype=torch.float32)
    total, count = 0.0, 0
    for sample in read.samples:
        ids = torch.from_numpy(sample.ids_T).long()
        mask = torch.from_numpy(sample.mask_T)[1:]
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(1, ids[1:, None])[:, 0][mask]
        total, count = total - float(taken.sum()), count + int(mask.sum())
    return total / count
