"""examples/smollm2_135m on this machine: a real checkpoint trained, saved, exported, and equal in
transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rest_mega.cli import read
from rest_mega.data.chat import ChatFormat
from rest_mega.data.prompts import load_prompts
from rest_mega.data.tokenizer import load_tokenizer
from rest_mega.environments import load_modules
from rest_mega.rollout.engine import seed_of

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "smollm2_135m"
(get_model,) = load_modules([str(EXAMPLE / "get_model.py")])
_, CONFIG = read(["train", str(EXAMPLE / "config.yaml")])
MODEL = ROOT / CONFIG.model.path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run directory of run.sh, which ends by comparing the export with the trainer; its 2.6 GB
    are removed afterwards."""
    if commands := get_model.missing():
        pytest.skip(f"SmolLM2's weights are not installed:\n{commands}")
    folder = tmp_path_factory.mktemp("smollm2")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [EXAMPLE / "run.sh", f"run.dir={folder}", "rollout.record=true"],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        check=True,  # check.py's exit code: every logit and log-prob within 1e-4 of transformers
        timeout=3600,
    )
    yield folder
    shutil.rmtree(folder)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def logprobs(folder: Path, ids: list[int]) -> Any:
    """transformers' log-prob of every token but the first at the run's temperature."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor(ids)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1] / CONFIG.rollout.temperature
    return torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0].numpy()


def first_prompt_ids(seed: int) -> list[int]:
    """Ids of the prompt whose first turn in step 1 was sampled from `seed`, whatever its
    sibling."""
    chat = ChatFormat(load_tokenizer(MODEL))
    (messages,) = (
        prompt.messages
        for prompt in load_prompts(ROOT / CONFIG.data.train)
        for sibling in range(CONFIG.rollout.samples_per_prompt)
        if seed_of(("train", CONFIG.run.seed, 1), prompt.id, sibling, 0) == seed
    )
    return chat.prompt_ids(messages)


def test_every_step_was_taken_and_the_trainer_agreed_with_the_engine(run_dir: Path) -> None:
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert not any(row["train/skipped"] for row in rows)
    trained = [row for row in rows if row["tokens/trained"] > 0]
    assert trained, "no group had a signal: choose another run.seed"
    assert all(row["train/grad_norm"] > 0 for row in trained)
    assert all(row["policy/rollout_gap_max"] < 1e-3 for row in trained)


def test_the_first_rollouts_are_the_original_model_s(run_dir: Path) -> None:
    """What the engine says it sampled with is what transformers says of the file the run started
    from: the weights went through load, PP 2, export and the engine."""
    (file,) = (run_dir / "rollouts").glob("*.jsonl")
    row = json.loads(file.read_text().splitlines()[0])
    prompt = first_prompt_ids(row["key"][0])
    expected = logprobs(MODEL, [*prompt, *row["ids"]])[len(prompt) - 1 :]
    np.testing.assert_allclose(row["logprobs"], expected, atol=1e-3)


def test_training_moved_every_tensor_and_nothing_else(run_dir: Path) -> None:
    old, new = (load_file(f / "model.safetensors") for f in (MODEL, run_dir / "hf"))
    assert set(old) == set(new)
    moved = {name: float(np.abs(old[name] - new[name]).max()) for name in old}
    # Three Adam steps; one is at most lr (1 - beta1) / sqrt(1 - beta2) + decay, or lr if fresh.
    assert all(0 < m < 3 * 2 * CONFIG.optimizer.lr for m in moved.values()), moved
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (run_dir / "hf" / name).read_bytes() == (MODEL / name).read_bytes()
