"""The same logits from a Megatron checkpoint in our model and from its Hugging Face folder in
transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rest_mega.config import ConfigError, ModelConfig
from rest_mega.records import Microbatch
from rest_mega.sync.load import TorchDistSource, load
from rest_mega.trainer.forward import run_chunk
from rest_mega.trainer.model import Architecture, build, head_weight
from rest_mega.trainer.parallel import Parallel

TOLERANCE = 1e-4
"""Of the largest logit; in fp32 both agree to about 1e-6."""


@torch.no_grad()
def compare_logits(
    torch_dist: Path,
    hugging_face: Path,
    architecture: Architecture,
    parallel: Parallel,
    tokens: int = 24,
) -> float:
    """Largest difference of fp32 logits over a few random tokens, in parts of the largest logit;
    ConfigError beyond TOLERANCE. Holds the whole model twice."""
    ids = np.random.default_rng(0).integers(0, architecture.vocab_size, tokens)
    want = _transformers(hugging_face, ids)
    got = _megatron(torch_dist, architecture, parallel, ids)
    gap = float((got - want).abs().max() / want.abs().max())
    if not gap <= TOLERANCE:  # a NaN is no parity either
        raise ConfigError(
            f"logits of {torch_dist} and {hugging_face} differ by {gap:.2g} of the largest (allowed"
            f": {TOLERANCE:g}); do not use the conversion, and report the model's config.json"
        )
    return gap


def _transformers(folder: Path, ids: np.ndarray) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True
    )
    return model.eval()(torch.from_numpy(ids)[None]).logits[0]


def _megatron(
    folder: Path, architecture: Architecture, parallel: Parallel, ids: np.ndarray
) -> torch.Tensor:
    chunks = build(architecture, ModelConfig(), parallel)
    load(chunks, TorchDistSource(str(folder)), architecture, parallel)
    (chunk,) = chunks
    hidden = run_chunk(chunk.eval(), _one_sequence(ids), parallel.device)
    logits = hidden[:, 0].float() @ head_weight(chunk).float().T
    return logits[:, : architecture.vocab_size].cpu()


def _one_sequence(ids: np.ndarray) -> Microbatch:
    count = len(ids)
    zeros = np.zeros(count, np.float32)
    return Microbatch(
        ids_T=ids.astype(np.int32),
        targets_T=ids.astype(np.int32),
        positions_T=np.arange(count, dtype=np.int32),
        lengths_S=np.array([count], dtype=np.int32),
        sample_T=np.zeros(count, np.int32),
        mask_T=np.zeros(count, bool),
        regions_T=np.zeros(count, np.int8),
        advantages_T=zeros,
        drift_T=zeros,
        logprobs_T=zeros,
    )
