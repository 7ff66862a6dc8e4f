"""Imported once by the fork server: torch, megatron-core adapted to the CPU, transformers, the
package."""

import torch

torch.set_num_threads(1)

from rest_mega.trainer import device  # noqa: E402

device.adapt_mcore()

from transformers import AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: E402

import rest_mega.train  # noqa: E402

__all__ = ["AutoModelForCausalLM", "Qwen3ForCausalLM", "rest_mega"]
