"""Imported once by the fork server: torch and megatron-core, adapted to the CPU."""

import torch

torch.set_num_threads(1)

from rest_mega.trainer import device  # noqa: E402

device.adapt_mcore()
