"""The nouns that travel through a training step, and the legend of shapes.

Legend of axes, written as suffixes: P prompts, G siblings of one prompt, S samples, M
micro-batches, T tokens (of one trajectory, or packed), R trained rows (the subset of T that carries
loss), V local vocabulary shard, D hidden. `logits_TV` has T rows and V columns. A *weight* is a
token's, a *parameter* the model's. All arrays are numpy; the trainer alone turns them into tensors.

A worked example, two assistant turns with one tool call between them:

    ids     <system+user prompt> | <call><end> | <tool result, header of next turn> | <answer><end>
    turn            -1           |      0      |                -1                   |       1
    mask             0           |      1      |                 0                   |       1
    version         -1           |      7      |                -1                   |       7

`mask` is 1 exactly for the tokens that the policy sampled. What follows the last turn is not in
`ids`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Reals = npt.NDArray[np.floating[Any]]
"""float32 or float64."""
SmallInts = npt.NDArray[np.int8]

Message = Mapping[str, Any]
"""An OpenAI chat message: role, content, and tool_calls or tool_call_id where they apply."""


@dataclass(frozen=True)
class Prompt:
    """One task: what the model is told, and what the environment needs to answer and to judge."""

    id: str
    """Unique in its file; groups, evaluation rows and reports are named by it."""
    messages: tuple[Message, ...]
    """The conversation up to the first assistant turn."""
    tools: tuple[Mapping[str, Any] | str, ...] = ()
    """What is shown to the model and may be called, as JSON-schema specs ({"type": "function",
    "function": {...}}) or names; empty: all tools of the environment."""
    environment: str = "none"
    """Name in rest_mega.environments.ENVIRONMENTS: what answers this prompt's tool calls."""
    task: Mapping[str, Any] = field(default_factory=dict)
    """For the environment and the rewards alone: initial state, gold calls, expected answer,
    kind."""


@dataclass(frozen=True)
class ToolCall:
    """One parsed call of a reply."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class ToolOutcome:
    """What became of one call: `status` is ok, or why the call failed."""

    status: str
    """ok, or one of rest_mega.config.FAILURES."""
    content: str
    """What the model is shown, success or failure."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Turn:
    """One assistant turn inside a trajectory's ids, and the answers its calls got."""

    start: int
    """First sampled token."""
    end: int
    """One past the last sampled token (the end-of-turn token belongs to the turn)."""
    text: str
    """The sampled bytes as text, without the end-of-turn token."""
    well_formed: bool
    """The reply obeys its dialect's grammar and ended with an end-of-turn token."""
    ended: bool = True
    """The last sampled token is an end-of-turn token; False when a limit cut the turn off."""
    answer: str = ""
    """The text outside reasoning and calls."""
    calls: tuple[ToolCall, ...] = ()
    outcomes: tuple[ToolOutcome, ...] = ()
    """One per call; a malformed reply has one outcome and no calls."""


@dataclass(frozen=True)
class Trajectory:
    """One episode, token for token as it was sampled."""

    prompt: Prompt
    sibling: int
    """0..G-1 in its group."""
    ids_T: Ints
    logprobs_T: Floats
    """Engine's log-prob of each sampled token, 0 elsewhere."""
    mask_T: Bools
    """True where the policy sampled the token."""
    turn_T: Ints
    """Assistant turn of a sampled token, -1 elsewhere."""
    version_T: Ints
    """Policy version that sampled the token, -1 elsewhere."""
    turns: tuple[Turn, ...]
    stop: str
    """answered | turn_limit | token_limit (a turn was cut off) | length (no room for another
    turn)."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """The environment's verdict: {"success": bool, ...}; empty for environments that do not
    judge."""


@dataclass(frozen=True)
class Sample:
    """One trajectory as the trainer sees it: no environments, no parts of its reward."""

    ids_T: Ints
    mask_T: Bools
    regions_T: SmallInts
    """credit.regions.Region of every token; the model meets it as an opaque small integer."""
    logprobs_T: Floats
    """Rollout log-probs, 0 where mask is 0."""
    version_T: Ints
    """Policy version that sampled the token, -1 where none did."""
    advantage: float
    reward: float = 0.0
    """What the advantage was made of, for penalties that only the trainer knows."""
    group: int = 0
    """Which of the replica's groups of siblings it belongs to; all of them are samples."""

    @property
    def trained_tokens(self) -> int:
        """Tokens that carry loss (the first token of a sequence has no prediction)."""
        return int(self.mask_T[1:].sum())


@dataclass(frozen=True)
class Microbatch:
    """Whole samples packed one after another; position t predicts `targets_T[t]`."""

    ids_T: Ints
    targets_T: Ints
    positions_T: Ints
    """Position inside its own sample, from 0."""
    lengths_S: Ints
    """Tokens of each packed sample (and of trailing padding, if any); sums to T."""
    sample_T: Ints
    """Index into this replica's samples of the optimizer step, -1 for padding."""
    mask_T: Bools
    """True where the target carries loss; R = mask_T.sum()."""
    regions_T: SmallInts
    """Of the target token."""
    advantages_T: Floats
    drift_T: Floats
    """Coefficient on |log pi/pi_old| of the target token in the loss; 0 but for KL-Cov's tokens."""
    logprobs_T: Floats
    """Rollout log-prob of the target token."""


@dataclass(frozen=True)
class TrainedRows:
    """The trained tokens whose log-probs this rank computes, as known before an optimizer step;
    none on ranks without the LM head."""

    ids_R: Ints
    positions_R: Ints
    """Position of the prediction inside its own sample."""
    rollout_R: Floats
    """Rollout log-prob."""
    logprob_R: Floats
    """Of the scoring pass, as is the entropy; both empty when there was none."""
    entropy_R: Floats
    advantages_R: Floats
    weights_R: Floats


@dataclass(frozen=True)
class TokenCredit:
    """What a token rule makes of single trained tokens."""

    factor_R: Floats
    """On the token's advantage, at least 0."""
    drift_R: Floats
    """Penalty in the loss per nat of |log pi/pi_old|, at least 0."""


Total = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
"""Sum of an array over all ranks, each trained token counted once; all ranks call it together."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, equal on every rank."""

    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    """True when no step was taken: gradients were not finite, or no token had a weight."""
    metrics: Mapping[str, float]
