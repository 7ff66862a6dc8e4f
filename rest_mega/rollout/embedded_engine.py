"""In-process generation with transformers: the default where there is no inference server.

Every sequence draws its tokens from its own seeded stream of uniforms by inverting the cumulative
distribution, so what is sampled depends neither on the batch nor on the layout of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from rest_mega.rollout.engine import (
    Completion,
    Enough,
    Follow,
    Request,
    Sampling,
    never,
    one_version,
    play_in_rounds,
)


class EmbeddedEngine:
    """A copy of the policy as a transformers model, decoded with a dynamic key-value cache."""

    repeatable = True

    def __init__(
        self,
        path: str,
        *,
        end_of_turn_ids: Sequence[int],
        pad_id: int,
        batch_size: int,
        dtype: str,
        device: torch.device,
    ) -> None:
        """`path`: folder whose config.json shapes the model; its weights are not read."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(path, local_files_only=True)
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self._model: Any = AutoModelForCausalLM.from_config(config, dtype=kind).to(device).eval()
        self._end, self._pad, self._batch_size = tuple(end_of_turn_ids), pad_id, batch_size
        self._vocab_size, self._device = int(config.vocab_size), device
        self._version = -1

    @property
    def version(self) -> int:
        """Version of the parameters being served."""
        return self._version

    @torch.no_grad()
    def load_parameters(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Copy every tensor into the model; ValueError for an unknown, missing or misshapen one."""
        targets = named_as_files(self._model)
        left = set(targets)
        for name, tensor in tensors:
            target = targets.get(name)
            if target is None or target.shape != tensor.shape:
                found = None if target is None else tuple(target.shape)
                raise ValueError(
                    f"the engine's model has shape {found} for {name!r}, not {tuple(tensor.shape)}"
                )
            target.copy_(tensor)
            left.discard(name)
        if left:
            raise ValueError(
                f"{len(left)} parameters were not sent to the engine, for example "
                f"{sorted(left)[:3]}"
            )
        self._version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Requests of similar length are decoded together, `batch_size` at a time."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].ids_T))
        done: dict[int, Completion] = {}
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            done.update(zip(rows, self._decode([requests[i] for i in rows], sampling), strict=True))
        return [done[i] for i in range(len(requests))]

    def play(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        follow: Follow,
        enough: Enough = never,
    ) -> None:
        """Turn by turn: the batch is what makes decoding in this process fast."""
        play_in_rounds(self, requests, sampling, follow, enough)

    def rest(self) -> None:
        """Nothing is held that the trainer could use."""

    def close(self) -> None:
        """Drop the model."""
        self._model = None

    @torch.no_grad()
    def _decode(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        from transformers import GenerationConfig

        ids, mask = self._left_padded(requests)
        longest = max(r.max_new_tokens for r in requests)
        draw = _Draw(requests, sampling, longest, self._vocab_size, self._device)
        settings = GenerationConfig(
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=list(self._end),
            pad_token_id=self._pad,
            use_cache=True,
        )
        out = self._model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=[draw]
        )
        new, logprobs = out[:, ids.shape[1] :].cpu().numpy(), draw.logprobs()
        return [self._completion(r, new[i], logprobs[i]) for i, r in enumerate(requests)]

    def _left_padded(self, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(r.ids_T) for r in requests)
        ids = torch.full((len(requests), longest), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.ids_T) :] = torch.from_numpy(
                request.ids_T.astype(np.int64)
            )
            mask[row, longest - len(request.ids_T) :] = 1
        return ids.to(self._device), mask.to(self._device)

    def _completion(self, request: Request, new: Any, logprobs: Any) -> Completion:
        ends = np.flatnonzero(np.isin(new, self._end))
        stop = int(ends[0]) + 1 if len(ends) else len(new)
        length = min(stop, request.max_new_tokens)
        return Completion(
            ids_T=new[:length].astype(np.int32),
            logprobs_T=logprobs[:length].astype(np.float32),
            finished=bool(len(ends)) and length == stop,
            version_T=one_version(self._version, length),
        )


def named_as_files(model: Any) -> dict[str, torch.Tensor]:
    """The model's parameters under the names of checkpoint files, where every expert has tensors of
    its own; transformers holds all experts of a layer in one tensor."""
    mixtral = model.config.model_type == "mixtral"
    mixture = "block_sparse_moe" if mixtral else "mlp"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    named: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        layer, found, part = name.partition(".mlp.experts.")
        for expert, tensor in enumerate(parameter if found else ()):
            target = f"{layer}.{mixture}.experts.{expert}"
            if part == "down_proj":
                named[f"{target}.{down}.weight"] = tensor
            else:
                halves = tensor.chunk(2)
                named |= {
                    f"{target}.{x}.weight": h for x, h in zip((gate, up), halves, strict=True)
                }
        if not found:
            named[name.replace(".mlp.gate.", f".{mixture}.gate.")] = parameter
    return named


class _Draw:
    """A logits processor that chooses each row's next token itself and remembers its log-prob."""

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        longest: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._sampling, self._vocab_size = sampling, vocab_size
        self._kept: list[torch.Tensor] = []
        if not sampling.greedy:
            uniforms = np.stack([np.random.default_rng(r.seed).random(longest) for r in requests])
            self._uniforms = torch.from_numpy(uniforms).to(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [B, V] -> the same shape, finite at the chosen token only."""
        logprobs = torch.log_softmax(
            scores[:, : self._vocab_size].float() / self._sampling.temperature, dim=-1
        )
        chosen = logprobs.argmax(-1) if self._sampling.greedy else self._sample(logprobs)
        self._kept.append(logprobs.gather(1, chosen[:, None])[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def _sample(self, logprobs: torch.Tensor) -> torch.Tensor:
        probs = logprobs.double().exp()
        if self._sampling.top_p < 1:
            probs = _nucleus(probs, self._sampling.top_p)
        cumulative = probs.cumsum(-1)
        aim = self._uniforms[:, len(self._kept), None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, aim, right=True)[:, 0].clamp_(max=probs.shape[1] - 1)

    def logprobs(self) -> Any:
        """[B, steps] log-probs of the chosen tokens."""
        return torch.stack(self._kept, dim=1).cpu().numpy()


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the smallest set of tokens whose mass reaches `top_p` (Holtzman et al., arXiv
    1904.09751)."""
    ranked, order = probs.sort(dim=-1, descending=True)
    outside = ranked.cumsum(-1) - ranked >= top_p
    return probs.masked_fill(torch.zeros_like(outside).scatter_(1, order, outside), 0.0)
