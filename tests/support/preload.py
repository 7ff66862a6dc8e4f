"""Imported once by the fork server: torch, megatron-core adapted to the CPU, transformers, the
package."""

import torch

torch.set_num_threads(1)

from rest_mega.trainer import device  # noqa: E402

device.adapt_mcore()

# Lazy inside transformers: name what reads configs and checkpoints, or every rank imports it anew.
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig  # noqa: E402, F401
from transformers.models.qwen3 import modeling_qwen3  # noqa: E402, F401

import rest_mega.train  # noqa: E402, F401
