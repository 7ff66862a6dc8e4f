"""Every knob of a run: one frozen dataclass per component, checked when built. Standard library
only.

`RunConfig.from_dict` builds the whole tree from a nested mapping (a parsed YAML file with the
`section.key=value` words of the command line laid over it) and answers an unknown key with the
nearest known ones. A component takes its own section, never the whole tree.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A value that the user can mend: the message tells the value, the rule and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def one_of(name: str, value: object, known: typing.Iterable[str]) -> None:
    """Raise `ConfigError` unless `value` is one of the `known` names; tells the nearest ones."""
    names = list(known)
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(names)}{hint}")


@dataclass(frozen=True)
class ModelConfig:
    """The policy: which checkpoint, in which precision, built from which layers."""

    path: str = ""
    """Folder of a Hugging Face checkpoint (config.json, *.safetensors) to start from."""
    init: str = "load"
    """load: read the weights in `path`; random: take only its config.json and draw the weights from
    `run.seed`."""
    reference: str = ""
    """Folder of a Hugging Face checkpoint of the same architecture: the reference policy of
    loss.kl, credit.kl_reward and telemetry.reference_kl, read only where one of them is on; empty:
    the weights the run started from. It takes one more copy of this rank's parameters in host
    memory, and may change when a run resumes."""
    dtype: str = "fp32"
    """fp32 or bf16: the dtype of parameters and activations; gradients and optimizer state stay
    fp32."""
    layers: str = "auto"
    """te: Transformer Engine's layers; local: torch SDPA attention; auto: te where it is installed
    on a GPU."""
    head: str = "auto"
    """What walks the LM head's logits: chunked (torch's matmuls, a tile at a time, any device),
    triton (kernels for CUDA) or auto (triton for bf16 on CUDA where it is installed, else
    chunked)."""
    recompute: str = "none"
    """none, selective (attention) or full (every layer): activations recomputed in the backward
    pass."""
    moe_aux_loss: float = 0.0
    """Coefficient of the load-balancing loss of a mixture of experts (Switch Transformer's, arXiv
    2101.03961): the mean over all tokens of the step, prompts included, of each micro-batch's.
    It depends on the cut into micro-batches, unlike all else."""

    def __post_init__(self) -> None:
        require(
            self.moe_aux_loss >= 0,
            f"model.moe_aux_loss={self.moe_aux_loss} must not be negative; use 0 for none",
        )
        one_of("model.dtype", self.dtype, ("fp32", "bf16"))
        one_of("model.layers", self.layers, ("auto", "te", "local"))
        one_of("model.head", self.head, ("auto", "chunked", "triton"))
        one_of("model.recompute", self.recompute, ("none", "selective", "full"))
        one_of("model.init", self.init, ("load", "random"))


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer and the way of speaking to the model."""

    path: str = ""
    """Folder with tokenizer.json or a SentencePiece *.model file; empty: `model.path`."""
    chat_template: str = ""
    """A Jinja file that replaces the tokenizer's own chat template; empty: the tokenizer's own."""
    dialect: str = "hermes"
    """How tool calls are written; see rest_mega.dialects.DIALECTS for the known names."""


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel groups; the data-parallel size is what the world size leaves."""

    tensor: int = 1
    """Tensor-parallel size (Megatron: tensor_model_parallel_size)."""
    pipeline: int = 1
    """Pipeline-parallel size (Megatron: pipeline_model_parallel_size)."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank, > 1 for the interleaved schedule (Megatron:
    virtual_pipeline_model_parallel_size)."""
    context: int = 1
    """Context-parallel size (Megatron: context_parallel_size)."""
    expert: int = 1
    """Ranks of TP x CP x DP over which a mixture's experts are spread, each whole on its rank; 1:
    every rank has all of them (Megatron: expert_model_parallel_size)."""
    sequence: bool = False
    """Sequence parallelism inside the tensor-parallel group (Megatron: sequence_parallel)."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert"):
            value = getattr(self, name)
            require(value >= 1, f"parallel.{name}={value} must be at least 1")
        require(
            not self.sequence or self.tensor > 1,
            "parallel.sequence=true needs parallel.tensor > 1; set parallel.sequence=false",
        )
        require(
            self.virtual_pipeline == 1 or self.pipeline > 1,
            f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline > 1",
        )

    @property
    def replica_size(self) -> int:
        """Ranks that hold one copy of the model: TP x PP x CP."""
        return self.tensor * self.pipeline * self.context

    def data_parallel(self, world_size: int) -> int:
        """Replicas in `world_size` ranks; raises ConfigError when it does not divide."""
        require(
            world_size % self.replica_size == 0,
            f"world size {world_size} is not a multiple of tensor {self.tensor} x pipeline "
            f"{self.pipeline} x "
            f"context {self.context} = {self.replica_size}; launch a multiple of "
            f"{self.replica_size} processes "
            "(torchrun --nproc-per-node) or change the parallel sizes",
        )
        ranks = world_size // self.pipeline
        require(
            ranks % self.expert == 0,
            f"parallel.expert={self.expert} does not divide the {ranks} ranks of a pipeline stage "
            f"(world size {world_size} / pipeline {self.pipeline}); use a divisor of {ranks}",
        )
        return world_size // self.replica_size


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedules."""

    name: str = "adam"
    """adam (AdamW), sgd, or muon (Muon for the hidden matrices, AdamW for embeddings and norms)."""
    lr: float = 1e-6
    """Peak learning rate; of the AdamW part when name=muon."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices when name=muon."""
    min_lr_ratio: float = 1.0
    """Final learning rate over peak learning rate."""
    decay: str = "constant"
    """constant, linear or cosine."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    weight_decay: float = 0.01
    """Decoupled weight decay (not on norms and biases)."""
    beta1: float = 0.9
    """Adam's first-moment decay; the momentum of sgd."""
    beta2: float = 0.95
    """Adam's second-moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    distributed: bool = True
    """Shard the optimizer state over the data-parallel ranks (mcore's DistributedOptimizer, which
    knows adam alone)."""

    def __post_init__(self) -> None:
        one_of("optimizer.name", self.name, ("adam", "sgd", "muon"))
        one_of("optimizer.decay", self.decay, ("constant", "linear", "cosine"))
        for name in ("lr", "muon_lr", "eps"):
            value = getattr(self, name)
            require(value > 0, f"optimizer.{name}={value} must be positive")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}={value} must be in [0, 1)")
        require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay={self.weight_decay} must not be negative",
        )
        require(
            0 <= self.min_lr_ratio <= 1,
            f"optimizer.min_lr_ratio={self.min_lr_ratio} must be in [0, 1]",
        )
        require(
            self.warmup_steps >= 0,
            f"optimizer.warmup_steps={self.warmup_steps} must not be negative",
        )
        require(self.clip_grad >= 0, f"optimizer.clip_grad={self.clip_grad} must not be negative")
        require(
            self.name == "adam" or not self.distributed,
            f"optimizer.name={self.name} cannot be sharded (muon orthogonalises whole matrices, "
            "mcore shards Adam alone): set optimizer.distributed=false",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where the prompts come from."""

    train: str = ""
    """Training prompts: JSONL (ours) or Parquet/JSON in ToolRL's format."""
    held_out: str = ""
    """Prompts for evaluation only; empty: no evaluation."""
    system: str = ""
    """A system message put before prompts that carry none."""


@dataclass(frozen=True)
class HttpToolConfig:
    """A tool behind an HTTP endpoint; its name is its key in `environment.http`."""

    url: str = ""
    """http:// or https:// address; {argument} in its path is filled with that argument."""
    method: str = "POST"
    """POST, PUT, PATCH: the other arguments are sent as a JSON object; GET, DELETE: as a query."""
    description: str = ""
    """What the model is told of the tool."""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})
    """JSON schema of the arguments."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every request. They are kept in the run directory: see secret_headers."""
    secret_headers: Mapping[str, str] = field(default_factory=dict)
    """Header -> the environment variable that holds its value."""
    idempotent: bool = False
    """Sending a request twice does what sending it once does: it may be retried."""
    concurrent: bool = True
    """Calls of one turn may run at the same time."""

    def __post_init__(self) -> None:
        web = self.url.startswith(("http://", "https://"))
        require(web, f"url={self.url!r} of an HTTP tool must begin with http:// or https://")
        one_of("method of an HTTP tool", self.method, ("GET", "POST", "PUT", "PATCH", "DELETE"))


@dataclass(frozen=True)
class McpServerConfig:
    """An MCP server, whose tools all become known; its name is its key in `environment.mcp`."""

    command: tuple[str, ...] = ()
    """Command that starts it as a child process (stdio); either this or `url`."""
    url: str = ""
    """Address of a running server (streamable HTTP)."""
    variables: tuple[str, ...] = ()
    """Environment variables that a server started by `command` is given besides PATH, HOME and
    their like."""
    idempotent: tuple[str, ...] = ()
    """Tools that may be retried, besides those that the server itself declares idempotent or
    read-only."""
    concurrent: bool = True
    """Calls of one turn may run at the same time."""

    def __post_init__(self) -> None:
        require(
            bool(self.command) != bool(self.url),
            f"an MCP server has command={list(self.command)} and url={self.url!r}; give one of "
            "them",
        )


FAILURES = (
    "malformed", "unknown_tool", "bad_arguments", "refused", "timeout", "crashed", "error",
)  # fmt: skip
"""What may become of a call besides ok."""


@dataclass(frozen=True)
class EnvironmentConfig:
    """Tools that all environments may use, and limits on what answers a tool call; the environment
    itself is named by each prompt."""

    modules: tuple[str, ...] = ()
    """Python files or importable modules that register what is yours (tools, environments, rewards,
    dialects, losses, model families), loaded at start."""
    http: Mapping[str, HttpToolConfig] = field(default_factory=dict)
    """Tools behind HTTP endpoints: name -> url, method, description, parameters, ..."""
    mcp: Mapping[str, McpServerConfig] = field(default_factory=dict)
    """MCP servers: name -> command or url, ...; needs the extra `mcp`."""
    call_timeout_s: float = 10.0
    """Deadline of one tool call with all its retries, in seconds."""
    episode_timeout_s: float = 120.0
    """Seconds that the tool calls of one episode may take together."""
    retries: int = 2
    """Further tries of a call that failed, for tools declared idempotent."""
    result_tokens: int = 1024
    """A longer tool result is cut to this many tokens."""
    result_characters: int = 65536
    """A longer tool result is cut to this many characters before its tokens are counted."""
    calls_per_turn: int = 16
    """More calls than these in one turn are refused (each is still answered)."""
    parallel_calls: int = 8
    """Calls of one turn that run at the same time at most."""
    parallel_episodes: int = 64
    """Episodes of one player (a process of each replica on each of its machines) whose calls are
    answered at the same time at most."""
    isolated_workers: int = 4
    """Worker processes of one player, as above, for tools declared isolated."""
    isolated_memory_mb: int = 512
    """Memory that an isolated tool may take, in MB."""
    messages: Mapping[str, str] = field(default_factory=dict)
    """What the model reads of a failed call, by status (see FAILURES), where it is not the default
    "error: {why}"; {why} and {tool} are filled in."""

    def __post_init__(self) -> None:
        for name in (
            "call_timeout_s",
            "episode_timeout_s",
            "result_tokens",
            "result_characters",
            "calls_per_turn",
            "parallel_calls",
            "parallel_episodes",
            "isolated_workers",
            "isolated_memory_mb",
        ):
            value = getattr(self, name)
            require(value > 0, f"environment.{name}={value} must be positive")
        require(self.retries >= 0, f"environment.retries={self.retries} must not be negative")
        for status, text in self.messages.items():
            one_of("key of environment.messages", status, FAILURES)
            self._check_message(status, text)

    def _check_message(self, status: str, text: str) -> None:
        try:
            text.format(why="", tool="")
        except (LookupError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"environment.messages.{status}={text!r} cannot be filled in "
                f"({type(error).__name__}: {error}); use {{why}} and {{tool}} alone, and double "
                "other braces"
            ) from error


SERVER_SIZES = ("tp_size", "tensor_parallel_size", "pp_size", "pipeline_parallel_size")
"""SGLang's arguments, by either name, whose product is the number of GPUs of a server."""


@dataclass(frozen=True)
class SglangConfig:
    """The SGLang servers of rollout.engine=sglang. Every other key below rollout.sglang is an
    argument of SGLang's own server, with underscores: rollout.sglang.mem_fraction_static=0.6."""

    urls: tuple[str, ...] = ()
    """Servers that run already (http://host:port), shared out evenly among the replicas; empty:
    start our own."""
    servers: int = 1
    """Servers that each replica starts on each of its machines (on its lead's alone where the
    machines have unequal parts of it); they end with the run."""
    router: str = ""
    """An sglang-router that requests go through: http://host:port of one that runs, start for one
    that each replica starts on each of its machines before the servers there, empty for none: the
    server that has the least to do is asked, an episode's next turn where its prefix is cached."""
    python: str = ""
    """Python interpreter of an environment with sglang; empty: the one that runs this."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the servers that we start."""
    gpus: tuple[int, ...] = ()
    """GPUs of a machine for the servers that are started on it, as the run numbers them: ranks
    train on the first ones, so with 4 ranks [4, 5, 6, 7] of 8 are free. Shared out in order among
    the machine's replicas, then their servers, tp_size to each."""
    colocate: bool = False
    """Servers share their replica's GPUs: they give their memory back while the trainer trains (so
    SGLang's enable_memory_saver is set), and take it again for the next rollouts. The trainer's
    parameters, gradients and optimizer stay: mem_fraction_static is of what they leave free."""
    transport: str = "tensor"
    """How new weights travel: tensor (to servers started on GPUs as CUDA IPC handles, to others
    inside requests), distributed (broadcast by NCCL, or gloo without GPUs) or disk (a checkpoint
    folder in the run directory that the servers can read)."""
    bucket_mb: int = 512
    """Weights travel in buckets: one is gathered while another is sent, and the two together (or
    one and its copy) take at most twice this much memory."""
    keep_copy: bool = True
    """Keep the newest weights in the run directory, for a server that has to be started again;
    without it a lost server ends the run. transport=disk always does."""
    verify: bool = True
    """Compare the checksums of what servers hold with those of what was sent, after every load;
    false for servers that rearrange weights (quantization, a kernel's own layout). Experts are
    compared on a CPU alone."""
    master_host: str = "127.0.0.1"
    """transport=distributed: where servers reach the trainer's process that sends them weights."""
    in_flight: int = 512
    """Episodes per server that are decoded or have their calls answered at a time."""
    restarts: int = 3
    """A server lost more often than this ends the run."""
    start_timeout_s: float = 600.0
    """Deadline for a server to become ready, and for a request to find one that is."""
    request_timeout_s: float = 600.0
    """Deadline of one generation request; past it the server counts as lost."""
    update_timeout_s: float = 300.0
    """Deadline of each request that controls a server or brings it a bucket of weights."""
    health_s: float = 30.0
    """Busy servers are asked this often, and have this long, to generate one token."""
    arguments: Mapping[str, object] = field(default_factory=dict, metadata={"others": True})
    """SGLang's own arguments; filled from the unknown keys of the section."""

    def __post_init__(self) -> None:
        one_of("rollout.sglang.transport", self.transport, ("tensor", "distributed", "disk"))
        for name in ("servers", "bucket_mb", "in_flight"):
            value = getattr(self, name)
            require(value >= 1, f"rollout.sglang.{name}={value} must be at least 1")
        require(self.restarts >= 0, f"rollout.sglang.restarts={self.restarts} must not be negative")
        for name in ("start_timeout_s", "request_timeout_s", "update_timeout_s", "health_s"):
            value = getattr(self, name)
            require(value > 0, f"rollout.sglang.{name}={value} must be positive")
        for url in self.urls:
            require(
                url.startswith(("http://", "https://")),
                f"rollout.sglang.urls has {url!r}; write http://host:port",
            )
        require(
            self.router in ("", "start") or self.router.startswith(("http://", "https://")),
            f"rollout.sglang.router={self.router!r} must be start, http://host:port or empty",
        )
        self._check_placement()

    @property
    def gpus_per_server(self) -> int:
        """GPUs of one server: SGLang's tensor times pipeline ranks."""
        return math.prod(int(str(self.arguments.get(name, 1))) for name in SERVER_SIZES)

    def _check_placement(self) -> None:
        gpus, urls = list(self.gpus), list(self.urls)
        require(
            len(set(gpus)) == len(gpus) and all(gpu >= 0 for gpu in gpus),
            f"rollout.sglang.gpus={gpus} must name each GPU once, from 0 on",
        )
        require(
            not (urls and (gpus or self.colocate)),
            f"rollout.sglang.urls={urls} run where they are: leave out rollout.sglang.gpus and "
            "colocate, which place servers that we start",
        )
        require(
            not (gpus and self.colocate),
            f"rollout.sglang.colocate=true puts servers on the trainer's GPUs: leave out "
            f"rollout.sglang.gpus={gpus}",
        )
        require(
            not (self.colocate and self.transport == "distributed"),
            "rollout.sglang.transport=distributed needs a GPU for each end (NCCL), which colocate "
            "does not give: use transport=tensor",
        )
        for name in SERVER_SIZES:
            value = self.arguments.get(name, 1)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value >= 1,
                f"rollout.sglang.{name}={value!r} must be a whole number, at least 1",
            )


@dataclass(frozen=True)
class RolloutConfig:
    """How trajectories are sampled."""

    engine: str = "embedded"
    """embedded (transformers, in a process of each replica on each of its machines), sglang
    (servers, see rollout.sglang) or replay (nothing is sampled: see rollout.replay)."""
    prompts_per_step: int = 8
    """Prompts of one training step, over all replicas."""
    samples_per_prompt: int = 8
    """Siblings per prompt: the group G of GRPO."""
    max_turns: int = 4
    """Assistant turns of one trajectory at most."""
    max_new_tokens: int = 256
    """Tokens of one assistant turn at most."""
    max_tokens: int = 2048
    """Tokens of one trajectory at most, prompt and tool outputs included."""
    temperature: float = 1.0
    """Sampling temperature; the trainer scores at the same temperature."""
    top_p: float = 1.0
    """Nucleus sampling; 1.0 keeps the sampled log-probabilities equal to the policy's."""
    batch_size: int = 64
    """Sequences that the embedded engine decodes together."""
    oversample: float = 0.0
    """Share of prompts that are begun beyond prompts_per_step: the step goes on as soon as
    prompts_per_step groups are done, whatever the slowest do. Which are done first is a matter of
    luck with engine=sglang, so such runs are not repeatable."""
    unfinished: str = "carry"
    """What becomes of the groups that over-sampling leaves: carry (the next step goes on with them
    first, a turn that was cut short included; their tokens then have several policy versions, see
    loss.correction) or drop (favours short episodes)."""
    bank: bool = True
    """Keep the episodes that are over in RUN/bank until a checkpoint covers their step: a run that
    resumes does not play them again. Where a batch itself makes training fail, false plays anew."""
    record: bool = False
    """Never remove anything from RUN/bank, so that every step can be trained on again
    (engine=replay)."""
    replay: str = ""
    """With engine=replay: the bank of another run, or the bank folder of a dump."""
    sglang: SglangConfig = field(default_factory=SglangConfig)
    """Used with engine=sglang alone."""

    @property
    def starts_engines(self) -> bool:
        """The run starts its own engines, on the machines of its ranks."""
        return self.engine == "embedded" or (self.engine == "sglang" and not self.sglang.urls)

    def __post_init__(self) -> None:
        one_of("rollout.engine", self.engine, ("embedded", "replay", "sglang"))
        for name in (
            "prompts_per_step",
            "samples_per_prompt",
            "max_turns",
            "max_new_tokens",
            "max_tokens",
            "batch_size",
        ):
            value = getattr(self, name)
            require(value >= 1, f"rollout.{name}={value} must be at least 1")
        one_of("rollout.unfinished", self.unfinished, ("carry", "drop"))
        require(
            self.oversample >= 0,
            f"rollout.oversample={self.oversample}, a share of rollout.prompts_per_step, must not "
            "be negative",
        )
        require(
            self.bank or not self.record,
            "rollout.record=true keeps what is in the bank: set rollout.bank=true",
        )
        require(self.temperature > 0, f"rollout.temperature={self.temperature} must be positive")
        require(0 < self.top_p <= 1, f"rollout.top_p={self.top_p} must be in (0, 1]")
        require(
            self.engine != "replay" or bool(self.replay),
            "rollout.engine=replay needs rollout.replay=FOLDER",
        )


@dataclass(frozen=True)
class RewardConfig:
    """The rubric: named reward functions and their coefficients (see rest_mega.rewards.RUBRIC)."""

    parts: Mapping[str, float] = field(default_factory=lambda: {"format": 1.0, "tool_calls": 3.0})
    """Name of a reward function -> its coefficient; the reward is the weighted sum."""

    schedule: str = "none"
    """none, or rest: the factors of `format` and `tool_calls` follow ResT's dynamic reward, from
    4 : 4 to 2 : 6 over 150 steps; see rest_mega.rewards.schedule."""

    def __post_init__(self) -> None:
        one_of("rewards.schedule", self.schedule, ("none", "rest"))
        require(
            self.schedule == "none" or {"format", "tool_calls"} <= set(self.parts),
            f"rewards.schedule={self.schedule} shifts reward between format and tool_calls: name "
            "both in rewards.parts, or set rewards.schedule=none",
        )
        require(len(self.parts) > 0, "rewards.parts is empty; name at least one reward function")
        require(
            any(self.parts.values()),
            f"rewards.parts={dict(self.parts)} has no coefficient besides 0: no reply would be "
            "better than another",
        )


KL_ESTIMATORS = ("k1", "k2", "k3")
EXTENSIBLE = {
    "credit.preset": ("rest", "rest-paper", "rest-code", "uniform"),
    "credit.advantage": ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline"),
    "loss.policy": ("ppo", "gspo", "cispo", "reinforce"),
}
"""Key -> the names that are shipped; files named by environment.modules may register more."""


@dataclass(frozen=True)
class CreditConfig:
    """ResT: what each token's gradient weighs, and the advantages of a group."""

    preset: str = "rest"
    """rest, rest-paper, rest-code or uniform: see rest_mega.credit.weights.PRESETS; or a name that
    one of environment.modules registers."""
    tau: float | None = None
    """Tempering of the entropy rule; 0: constants, 1: the paper's Eq. 9; null: the preset's."""
    rule: str | None = None
    """What a raw weight divides by: one_minus_exp (1 - exp(-H)) or entropy (Eq. 9's 1 / H); null:
    the preset's. Without effect where tau is 0."""
    entropy_floor: float | None = None
    """h0: entropies below count as this many nats; null: the preset's."""
    w_min: float | None = None
    """Lower clip of a raw weight; null: the preset's."""
    w_max: float | None = None
    """Upper clip of a raw weight; null: the preset's."""
    entropy_momentum: float = 0.9
    """Running mean of the region entropies: share of the old value kept at each step."""
    tokens: str = "all"
    """What becomes of single tokens, besides their region's weight: all (nothing), high-entropy,
    clip-cov, kl-cov or entropy-advantage; see rest_mega.credit.advantages.TOKENS."""
    high_entropy_share: float = 0.2
    """tokens=high-entropy: share of the global batch's weighted tokens that carry gradient, those
    of highest entropy (arXiv 2506.01939)."""
    clip_cov_share: float = 2e-4
    """tokens=clip-cov: share of the global batch's weighted tokens that lose their gradient (arXiv
    2505.22617)."""
    clip_cov_low: float = 1.0
    """tokens=clip-cov: lowest covariance of log-prob and advantage of a token that may be
    chosen."""
    clip_cov_high: float = 5.0
    """tokens=clip-cov: highest covariance of a token that may be chosen."""
    kl_cov_share: float = 2e-3
    """tokens=kl-cov: share of the global batch's weighted tokens that are penalised, those of
    highest covariance of log-prob and advantage (arXiv 2505.22617)."""
    kl_cov_coefficient: float = 1.0
    """tokens=kl-cov: their penalty in the loss is this times |log pi - log pi_old|."""
    shaping_alpha: float = 0.4
    """tokens=entropy-advantage: advantage added per nat of a token's entropy (arXiv 2506.14758)."""
    shaping_kappa: float = 2.0
    """tokens=entropy-advantage: at most |advantage| / shaping_kappa is added."""
    advantage: str = "grpo"
    """grpo (mean and std of the group), dr_grpo (mean only), rloo, reinforce++ (mean and std of the
    global batch) or reinforce++-baseline (mean of the group, std of the global batch); or a name
    that one of environment.modules registers."""
    equal_groups: str = "drop"
    """What becomes of groups whose rewards are all equal and so carry no signal: keep (their
    advantages are 0, their tokens count in the loss's denominator), drop, or resample (drop, and
    draw further prompts until rollout.prompts_per_step groups have signal: DAPO's dynamic sampling,
    arXiv 2503.14476)."""
    resample_rounds: int = 3
    """equal_groups=resample: rounds of further prompts at most; a round draws exactly as many as
    are missing, and a step that is still short after the last one trains on what it has."""
    kl_reward: float = 0.0
    """Before advantages, every trajectory's reward falls by this times its KL to the reference
    policy (model.reference), summed over its trained tokens as the scoring pass saw them; 0: no
    such penalty. Groups that equal_groups leaves out stay out: it looks at the task's rewards."""
    kl_reward_estimator: str = "k1"
    """k1 (the log-ratio), k2 or k3; see rest_mega.losses.kl."""

    def __post_init__(self) -> None:
        one_of("credit.equal_groups", self.equal_groups, ("keep", "drop", "resample"))
        require(
            self.resample_rounds >= 1,
            f"credit.resample_rounds={self.resample_rounds} must be at least 1; to draw no further "
            "prompts set credit.equal_groups=drop",
        )
        require(
            self.equal_groups != "resample" or self.advantage != "reinforce++",
            "credit.equal_groups=resample has nothing to replace with "
            "credit.advantage=reinforce++, under which groups of equal rewards carry signal: set "
            "credit.equal_groups=drop or credit.advantage=reinforce++-baseline",
        )
        if self.rule is not None:
            one_of("credit.rule", self.rule, ("one_minus_exp", "entropy"))
        tokens = ("all", "high-entropy", "clip-cov", "kl-cov", "entropy-advantage")
        one_of("credit.tokens", self.tokens, tokens)
        one_of("credit.kl_reward_estimator", self.kl_reward_estimator, KL_ESTIMATORS)
        for name in ("kl_reward", "kl_cov_coefficient"):
            value = getattr(self, name)
            require(value >= 0, f"credit.{name}={value} must not be negative")
        for name in ("high_entropy_share", "clip_cov_share", "kl_cov_share"):
            share = getattr(self, name)
            require(0 < share <= 1, f"credit.{name}={share} must be in (0, 1]")
        require(
            self.clip_cov_low <= self.clip_cov_high,
            f"credit.clip_cov_low={self.clip_cov_low} must not exceed "
            f"credit.clip_cov_high={self.clip_cov_high}",
        )
        require(
            self.shaping_alpha >= 0,
            f"credit.shaping_alpha={self.shaping_alpha} must not be negative",
        )
        require(
            self.shaping_kappa > 1,
            f"credit.shaping_kappa={self.shaping_kappa} must be greater than 1: an advantage must "
            "keep its sign",
        )
        require(
            0 <= self.entropy_momentum < 1,
            f"credit.entropy_momentum={self.entropy_momentum} must be in [0, 1)",
        )


CORRECTION_BANDS: Mapping[str, tuple[float, float]] = types.MappingProxyType(
    {"none": (0.0, math.inf), "tis": (0.0, 2.0), "mis": (0.5, 5.0), "sequence-mask": (0.95, 1.05)}
)
"""Correction -> its own (low, high) for the ratio trainer / engine. mis: IcePop's; others ours."""


@dataclass(frozen=True)
class LossConfig:
    """The surrogate, how its tokens are put together, the correction for the engine's own
    log-probs, and the penalties beside the surrogate."""

    policy: str = "ppo"
    """ppo (clip; dual clip when dual_clip > 0), gspo (one ratio per trajectory, clipped), cispo
    (clipped ratio without gradient, times A log pi) or reinforce; or a name that one of
    environment.modules registers."""
    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped. gspo's ratio is a trajectory's mean and far closer to
    1: its paper uses 3e-4 and 4e-4. cispo's paper sets no lower bound: 0.999."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high are clipped; larger than clip_low is DAPO's clip-higher."""
    dual_clip: float = 3.0
    """ppo only: bound c on the loss of negative advantages (dual clip); 0 switches it off."""
    old_logprobs: str = "trainer"
    """trainer: log-probs of the scoring pass; rollout: those the engine sampled with."""
    aggregation: str = "weighted-token-mean"
    """What the weighted token losses are divided by, over the global batch of an optimizer step:
    weighted-token-mean (the sum of weights), token-mean (the number of trained tokens, DAPO),
    sequence-mean (the mean over trajectories of the mean over a trajectory's tokens, GRPO) or fixed
    (trajectories x fixed_length, Dr. GRPO). Trajectories are those trained on: groups that
    credit.equal_groups leaves out do not count."""
    fixed_length: int = 1024
    """aggregation=fixed only: the length every trajectory counts as; Dr. GRPO takes the most tokens
    a reply may have."""
    correction: str = "none"
    """What the ratio trainer / engine of the sampled tokens does to their loss: none; tis (times
    the ratio, at most correction_high); mis (times the ratio, 0 outside the band); sequence-mask
    (0 for trajectories whose geometric mean ratio is outside the band)."""
    correction_low: float | None = None
    """Lower end of the band; null: the correction's own (mis 0.5, sequence-mask 0.95)."""
    correction_high: float | None = None
    """Upper end of the band, the cap of tis; null: the correction's own (tis 2, mis 5,
    sequence-mask 1.05)."""
    kl: float = 0.0
    """Coefficient of the KL to the reference policy (model.reference), a penalty on every trained
    token alike, whatever its weight; 0: none."""
    kl_estimator: str = "k3"
    """k1, k2 or k3 (GRPO's). As a loss only k2 pulls as KL(policy||reference) does: k1's gradient
    has mean zero, k3's is that of KL(reference||policy); see rest_mega.losses.kl."""
    entropy_bonus: float = 0.0
    """Coefficient of the trained tokens' full-vocabulary entropy (nats, at rollout.temperature),
    which the loss falls by; every token counts once, whatever its weight."""
    optimizer_steps: int = 1
    """Optimizer steps per rollout batch: whole trajectories are cut into this many parts."""
    scoring: bool = True
    """Score the batch (forward only) before training on it. false saves that pass, about one of
    four forward-equivalents of a step (backward counts as two); the old log-prob is then the
    current one, which is exact for a single optimizer step. The weights know the region entropies
    up to the step before (in the first step none: all regions count as equally uncertain)."""

    def __post_init__(self) -> None:
        one_of("loss.old_logprobs", self.old_logprobs, ("trainer", "rollout"))
        require(0 < self.clip_low < 1, f"loss.clip_low={self.clip_low} must be in (0, 1)")
        require(self.clip_high > 0, f"loss.clip_high={self.clip_high} must be positive")
        require(
            self.dual_clip == 0 or self.dual_clip > 1,
            f"loss.dual_clip={self.dual_clip} must be 0 (off) or greater than 1",
        )
        aggregations = ("weighted-token-mean", "token-mean", "sequence-mean", "fixed")
        one_of("loss.aggregation", self.aggregation, aggregations)
        require(self.fixed_length >= 1, f"loss.fixed_length={self.fixed_length} must be at least 1")
        self._check_correction()
        one_of("loss.kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        for name in ("kl", "entropy_bonus"):
            value = getattr(self, name)
            require(value >= 0, f"loss.{name}={value} must not be negative")
        require(
            self.optimizer_steps >= 1,
            f"loss.optimizer_steps={self.optimizer_steps} must be at least 1",
        )
        require(
            self.scoring or self.optimizer_steps == 1 or self.old_logprobs == "rollout",
            f"loss.scoring=false with loss.optimizer_steps={self.optimizer_steps} has no old "
            "log-probs: set loss.scoring=true, loss.optimizer_steps=1 or loss.old_logprobs=rollout",
        )
        require(
            self.scoring or self.correction == "none",
            f"loss.correction={self.correction} is decided before the training pass, by the scores "
            "that loss.scoring=false leaves out: set loss.scoring=true or loss.correction=none",
        )

    def _check_correction(self) -> None:
        one_of("loss.correction", self.correction, CORRECTION_BANDS)
        low, high = self.correction_band
        require(
            0 <= low < high,
            f"loss.correction_low={low} and loss.correction_high={high} must satisfy 0 <= low < "
            "high",
        )
        require(
            self.correction != "sequence-mask" or low <= 1 <= high,
            f"loss.correction_low={low} and loss.correction_high={high} must have 1 between them: "
            "trajectories on which trainer and engine agree would be masked",
        )
        require(
            self.correction not in ("tis", "mis") or self.old_logprobs == "trainer",
            f"loss.correction={self.correction} with loss.old_logprobs=rollout would count the "
            "ratio trainer / engine twice: set loss.old_logprobs=trainer or loss.correction=none",
        )

    @property
    def correction_band(self) -> tuple[float, float]:
        """(low, high) of the ratio trainer / engine that `correction` goes by."""
        low, high = CORRECTION_BANDS[self.correction]
        return (
            low if self.correction_low is None else self.correction_low,
            high if self.correction_high is None else self.correction_high,
        )


@dataclass(frozen=True)
class PackingConfig:
    """How trajectories fill micro-batches."""

    tokens: int = 4096
    """Tokens of one micro-batch at most; no trajectory may be longer."""

    def __post_init__(self) -> None:
        require(self.tokens >= 1, f"packing.tokens={self.tokens} must be at least 1")


@dataclass(frozen=True)
class GuardConfig:
    """Thresholds on |log-prob of the trainer - log-prob of the engine| of the sampled tokens, which
    stop a run before the optimizer step whose batch crosses them and keep the batch in
    RUN/dumps/step_N.

    Both take the same parameters, so the gap is rounding alone: about 1e-6 nats in fp32 on a CPU.
    With bf16 on GPUs the mean is reported between 0.01 and 0.04 (vllm-project/vime issue 64), and
    0.1 is the bound that slime's own tests set (THUDM/slime pull request 1968); runs with a fault,
    or trained far off policy, show 0.2 to 0.4 (Gen-Verse/OpenClaw-RL issue 69). p99 = 1 is ours. A
    gap that is not finite crosses any threshold. Training on recordings of other parameters
    (rollout.engine=replay) has a gap by design: set the thresholds to null.
    """

    every: int = 1
    """Look every this many steps; 0: never. With loss.scoring=false the trainer's log-probs are not
    known before the step: nothing is looked at."""
    mean: float | None = 0.1
    """Largest mean over the trained tokens of all replicas, in nats; null: any."""
    p99: float | None = 1.0
    """Largest 99th percentile, in nats; null: any."""
    max: float | None = None
    """Largest single gap, in nats; null: any. In bf16 a rare token may differ by several nats."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"guard.every={self.every} must not be negative; 0: never")
        for name in ("mean", "p99", "max"):
            limit = getattr(self, name)
            require(
                limit is None or limit > 0,
                f"guard.{name}={limit} must be positive: trainer and engine round differently; "
                "null switches it off",
            )


@dataclass(frozen=True)
class SftConfig:
    """Supervised warm start (`rest-mega sft`)."""

    data: str = ""
    """Chat dialogues as JSONL: {"messages": [...], "tools": [...]} per line; loss on assistant
    turns only."""
    dialogues_per_step: int = 32
    """Dialogues of one optimizer step, over all replicas."""
    shuffle: bool = True
    """Draw dialogues in seeded random order; false keeps the file's order (a curriculum)."""

    def __post_init__(self) -> None:
        require(
            self.dialogues_per_step >= 1,
            f"sft.dialogues_per_step={self.dialogues_per_step} must be at least 1",
        )


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible server that is evaluated in the place of a model of ours."""

    url: str = ""
    """Address up to where /chat/completions begins, such as http://host:8000/v1."""
    model: str = ""
    """The model's name there; empty: the only one that it serves."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the API key; without that variable none is sent."""
    mode: str = "tools"
    """tools: tools and calls travel in the API's own fields; text: tools stand in the system
    message, and calls are read from the reply's text by tokenizer.dialect."""
    in_flight: int = 16
    """Episodes under way at a time."""
    request_timeout_s: float = 600.0
    """Deadline of one request."""
    retries: int = 5
    """Further tries of a request that the server has certainly not begun (busy, not reachable)."""

    def __post_init__(self) -> None:
        require(
            not self.url or self.url.startswith(("http://", "https://")),
            f"evaluation.endpoint.url={self.url!r} must begin with http:// or https://",
        )
        one_of("evaluation.endpoint.mode", self.mode, ("tools", "text"))
        require(self.in_flight >= 1, f"evaluation.endpoint.in_flight={self.in_flight} must be >= 1")
        require(self.retries >= 0, f"evaluation.endpoint.retries={self.retries} must not be < 0")
        require(
            self.request_timeout_s > 0,
            f"evaluation.endpoint.request_timeout_s={self.request_timeout_s} must be positive",
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out success and benchmarks, before, during and after training."""

    every: int = 0
    """Evaluate every this many steps besides the first and the last; 0: only those two."""
    prompts: int = 128
    """Held-out prompts used, from the start of the file."""
    greedy: bool = True
    """Also evaluate held-out prompts with greedy decoding (one sample at temperature
    rollout.temperature always is)."""
    suites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Benchmarks (api-bank, bfcl) -> their categories, [] for all: suites={api-bank: []}."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Benchmark -> where its data is, for those that bring none."""
    limit: int = 0
    """Tasks of each category of a benchmark, drawn by `seed`; 0: all."""
    side: str = "all"
    """all, or test: leave out the benchmark entries that may be trained on (half of BFCL's
    multi-turn scenarios; see `split` in rest_mega/data/bfcl_rows.py)."""
    samples: int = 1
    """Replies to each task of a benchmark; pass@k needs k of them."""
    seed: int = 0
    """Of the tasks and the replies drawn; not run.seed, so that all runs are asked the same."""
    temperature: float = 0.0
    """Of benchmarks; 0: greedy."""
    top_p: float = 1.0
    """Of benchmarks: nucleus sampling."""
    max_new_tokens: int = 0
    """Tokens of a turn in benchmarks at most; 0: rollout.max_new_tokens."""
    max_tokens: int = 0
    """Tokens of an episode of a benchmark at most, its prompt included; 0: rollout.max_tokens. A
    prompt that leaves no room to reply counts as a wrong answer."""
    best: str = ""
    """A metric such as api-bank/overall or greedy_success: whenever an evaluation reaches a new
    best of it, the weights are written to RUN/best; empty: they are not."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Of `rest-mega eval` alone."""

    def __post_init__(self) -> None:
        for name in ("every", "limit", "max_new_tokens", "max_tokens", "temperature"):
            value = getattr(self, name)
            require(value >= 0, f"evaluation.{name}={value} must not be negative")
        for name in ("prompts", "samples"):
            value = getattr(self, name)
            require(value >= 1, f"evaluation.{name}={value} must be at least 1")
        one_of("evaluation.side", self.side, ("all", "test"))
        require(0 < self.top_p <= 1, f"evaluation.top_p={self.top_p} must be in (0, 1]")
        require(0 <= self.seed < 2**31, f"evaluation.seed={self.seed} must be in [0, 2^31)")
        require(
            self.samples == 1 or self.temperature > 0,
            f"evaluation.samples={self.samples} greedy replies would all be the same: set "
            "evaluation.temperature above 0, or evaluation.samples=1",
        )


@dataclass(frozen=True)
class TelemetryConfig:
    """What a run says of itself."""

    tensorboard: bool = True
    """Write TensorBoard event files into the run directory."""
    wandb: str = ""
    """Weights & Biases: offline (files in RUN/wandb, for `wandb sync`) or online; empty: none.
    Needs the extra `tracking`."""
    mlflow: str = ""
    """MLflow: a folder, or the URL of a tracking server; empty: none. Needs the extra
    `tracking`."""
    project: str = "rest_mega"
    """Project in W&B, experiment in MLflow."""
    name: str = ""
    """The run's name in both; empty: that of the run directory."""
    trajectories: int = 16
    """Trajectories kept per step for the report."""
    timelines: int = 64
    """Ranks that keep a timeline of their phases (RUN/phases), at most; they are spread evenly."""
    reference_kl: bool = False
    """Measure the KL to the reference policy also where no penalty needs it; a forward pass more
    per step."""
    console: str = "auto"
    """bar: a live progress bar; plain: a line per step; auto: bar on a terminal."""

    def __post_init__(self) -> None:
        one_of("telemetry.wandb", self.wandb, ("", "offline", "online"))
        one_of("telemetry.console", self.console, ("auto", "bar", "plain"))
        for name in ("trajectories", "timelines"):
            value = getattr(self, name)
            require(value >= 0, f"telemetry.{name}={value} must not be negative; 0 keeps none")


@dataclass(frozen=True)
class ProfileConfig:
    """Traces of a few steps, in RUN/profile."""

    steps: str = ""
    """FIRST-LAST, for example 5-7: steps that are profiled, on every rank; empty: none."""
    phases: tuple[str, ...] = ("score", "train")
    """Phases of which torch writes a trace of its own, among rollout, score, train, publish,
    evaluate and save. The timeline of the pipeline has all of them."""

    def __post_init__(self) -> None:
        known = ("rollout", "score", "train", "publish", "evaluate", "save")
        for name in self.phases:
            one_of("profile.phases", name, known)
        match = re.fullmatch(r"(\d+)-(\d+)", self.steps)
        require(
            not self.steps or (match is not None and 1 <= int(match[1]) <= int(match[2])),
            f"profile.steps={self.steps!r} is no window of steps: write FIRST-LAST, from 1, "
            "for example 5-7",
        )

    @property
    def window(self) -> tuple[int, ...]:
        """(first, last) of the profiled steps; empty for none."""
        return tuple(map(int, self.steps.split("-"))) if self.steps else ()


@dataclass(frozen=True)
class LoopConfig:
    """The run itself."""

    dir: str = "runs/default"
    """Run directory: metrics, checkpoints, report. A run resumes from the newest checkpoint in
    it."""
    steps: int = 100
    """Training steps; schedules and curriculum run over all of them."""
    until: int | None = None
    """End after this step, with all that a run does after its last one; null: after `steps`. A
    later run without it goes on as if there had been no pause."""
    seed: int = 0
    """Seed of everything random: prompts, sampling, initialisation."""
    device: str = "auto"
    """auto, cpu or cuda."""
    save_every: int = 50
    """Checkpoint every this many steps besides the last; 0: only the last."""
    keep_checkpoints: int = 2
    """Older checkpoints are removed; 2 or more, so that one is left when the newest is damaged."""
    async_save: bool = True
    """Write checkpoints from a forked child while training goes on; false: training waits."""
    export: bool = True
    """Write the final weights as a Hugging Face checkpoint (RUN/hf)."""
    export_every: int = 0
    """Write a Hugging Face checkpoint after every this many steps too (RUN/hf_step_N); 0: none."""
    max_nonfinite: int = 3
    """So many steps in a row may have a loss or gradients that are not finite (they are not
    applied, and their batch is kept in RUN/dumps); one more ends the run with exit code 4."""
    load: str = ""
    """Where to go on from while run.dir has no checkpoint: a checkpoint, or a run directory, whose
    newest one is taken, with its optimizer, schedules and cursor (Megatron's --load)."""
    fresh: bool = False
    """Start anew, moving aside what the run directory holds; false: resume."""

    def __post_init__(self) -> None:
        one_of("run.device", self.device, ("auto", "cpu", "cuda"))
        require(self.steps >= 0, f"run.steps={self.steps} must not be negative")
        require(
            self.until is None or 0 <= self.until <= self.steps,
            f"run.until={self.until} must be between 0 and run.steps={self.steps}",
        )
        for name in ("save_every", "export_every", "max_nonfinite"):
            every = getattr(self, name)
            require(every >= 0, f"run.{name}={every} must not be negative")
        require(
            self.keep_checkpoints >= 1,
            f"run.keep_checkpoints={self.keep_checkpoints} must be at least 1",
        )
        require(0 <= self.seed < 2**31, f"run.seed={self.seed} must be in [0, 2^31)")

    @property
    def last_step(self) -> int:
        """The step after which this run ends."""
        return self.steps if self.until is None else self.until


@dataclass(frozen=True)
class DeadlineConfig:
    """How long each phase of a run may last, in seconds: a rank that is still in it afterwards says
    which ranks have not come as far, every rank writes its stacks to RUN/hang, and the run ends."""

    join: float = 600.0
    """Until all ranks of the run have arrived, each with the inputs read."""
    start: float = 3600.0
    """Reading the checkpoint, building model, optimizer and engine."""
    rollout: float = 7200.0
    """One step's rollouts, tool calls included."""
    score: float = 1800.0
    """One scoring pass."""
    train: float = 1800.0
    """One step's optimizer steps."""
    publish: float = 900.0
    """Handing the parameters to the engine."""
    evaluate: float = 7200.0
    """One evaluation."""
    save: float = 1800.0
    """What saving costs the loop: planning a checkpoint, waiting for the one before it, the
    export."""
    loop: float = 600.0
    """Between two phases."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            seconds = getattr(self, item.name)
            require(seconds > 0, f"deadlines.{item.name}={seconds} must be positive")

    @property
    def collective(self) -> float:
        """Deadline of a single collective: past every phase's, whose watchdog tells more."""
        return float(max(dataclasses.asdict(self).values())) + 60.0


@dataclass(frozen=True)
class RunConfig:
    """The whole tree; each component takes its own section."""

    run: LoopConfig = field(default_factory=LoopConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    deadlines: DeadlineConfig = field(default_factory=DeadlineConfig)

    def __post_init__(self) -> None:
        if not self.environment.modules:
            self.check_names(EXTENSIBLE)
        require(
            self.rollout.prompts_per_step * self.rollout.samples_per_prompt
            >= self.loss.optimizer_steps,
            f"loss.optimizer_steps={self.loss.optimizer_steps} exceeds the trajectories of a step "
            f"({self.rollout.prompts_per_step} prompts x {self.rollout.samples_per_prompt} "
            "samples)",
        )
        require(
            self.credit.advantage != "reinforce++-baseline" or self.rollout.samples_per_prompt > 1,
            "credit.advantage=reinforce++-baseline takes a group's mean off and needs siblings: "
            "set rollout.samples_per_prompt to 2 or more, or credit.advantage=reinforce++",
        )
        require(
            self.rollout.max_tokens <= self.packing.tokens,
            f"rollout.max_tokens={self.rollout.max_tokens} exceeds "
            f"packing.tokens={self.packing.tokens}: "
            "a trajectory must fit into one micro-batch; raise packing.tokens or lower "
            "rollout.max_tokens",
        )
        require(
            self.loss.scoring or self.credit.tokens == "all",
            f"credit.tokens={self.credit.tokens} chooses by the scores of the batch, which "
            "loss.scoring=false leaves out: set loss.scoring=true or credit.tokens=all",
        )
        require(
            self.loss.scoring or self.credit.kl_reward == 0,
            f"credit.kl_reward={self.credit.kl_reward} compares the scores of the batch with the "
            "reference's, and loss.scoring=false leaves them out: set loss.scoring=true or "
            "credit.kl_reward=0 (loss.kl needs no scores)",
        )
        require(
            self.credit.tokens != "kl-cov"
            or self.loss.optimizer_steps > 1
            or self.loss.old_logprobs == "rollout",
            "credit.tokens=kl-cov penalises what has moved since the scoring pass, and with "
            "loss.optimizer_steps=1 nothing has: set loss.optimizer_steps above 1, "
            "loss.old_logprobs=rollout or credit.tokens=all",
        )
        require(
            self.optimizer.name != "muon" or self.model.dtype == "fp32",
            f"optimizer.name=muon trains in fp32, not model.dtype={self.model.dtype}: set "
            "model.dtype=fp32 or another optimizer",
        )

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> RunConfig:
        """Build the tree from a nested mapping; ConfigError names unknown keys and wrong types."""
        return typing.cast(RunConfig, _build(cls, tree, ""))

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain nested dictionaries (JSON and YAML can hold it)."""
        return dataclasses.asdict(self)

    @property
    def needs_reference(self) -> bool:
        """A penalty or a metric compares the policy with the reference policy."""
        return self.loss.kl > 0 or self.credit.kl_reward > 0 or self.telemetry.reference_kl

    def check_names(self, tables: Mapping[str, typing.Iterable[str]]) -> None:
        """Raise ConfigError unless the value of each key of `tables` is one of its names."""
        for key, names in tables.items():
            section, name = key.split(".")
            one_of(key, getattr(getattr(self, section), name), names)

    def check_world(self, world_size: int) -> None:
        """Raise ConfigError unless this config can run on `world_size` ranks."""
        replicas = self.parallel.data_parallel(world_size)
        require(
            self.rollout.prompts_per_step % replicas == 0,
            f"rollout.prompts_per_step={self.rollout.prompts_per_step} is not a multiple of the "
            f"{replicas} "
            f"data-parallel replicas; use a multiple of {replicas}",
        )


def known_keys() -> list[str]:
    """Every `section.key` of RunConfig, `rollout.sglang.key` among them."""
    return list(_keys(RunConfig, ""))


def _keys(cls: Any, prefix: str) -> typing.Iterator[str]:
    hints = typing.get_type_hints(cls)
    for key in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[key.name]):
            yield from _keys(hints[key.name], f"{prefix}{key.name}.")
        else:
            yield prefix + key.name


def _build(cls: Any, tree: Mapping[str, Any], prefix: str) -> object:
    tree = {} if tree is None else tree  # a section whose keys are all commented out
    require(
        isinstance(tree, Mapping),
        f"{prefix.rstrip('.') or 'the config'} must be a mapping, not {tree!r}",
    )
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    tree = _gather_others(cls, tree, names)
    for key, value in tree.items():
        if key not in names:
            raise _unknown(f"{prefix}{key}", [f"{prefix}{n}" for n in names])
        kind = hints[key]
        values[key] = _coerce(f"{prefix}{key}", value, kind)
    return cls(**values)


def _gather_others(cls: Any, tree: Mapping[str, Any], names: list[str]) -> Mapping[str, Any]:
    """The tree with its unknown keys in the field that is marked to take them, where there is
    one."""
    taking = [f.name for f in dataclasses.fields(cls) if f.metadata.get("others")]
    others = {key: value for key, value in tree.items() if key not in names}
    given = tree.get(taking[0], {}) if taking else None
    if not others or not isinstance(given, Mapping):
        return tree
    known = {key: value for key, value in tree.items() if key in names}
    return {**known, taking[0]: {**given, **others}}


def _unknown(key: str, siblings: list[str]) -> ConfigError:
    # Compare last parts: a long common section would make any two keys look alike.
    word = key.split(".")[-1]
    known = list(dict.fromkeys(siblings + known_keys()))
    names = difflib.get_close_matches(word, [k.split(".")[-1] for k in known], n=3)
    near = [k for name in dict.fromkeys(names) for k in known if k.split(".")[-1] == name][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(siblings)}"
    return ConfigError(f"unknown config key {key!r}; {hint}")


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`; only lossless conversions (YAML's `1e-3` is a string, `2` may be a
    float)."""
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{key}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _coerce(key, value, next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{key}={value!r} must be a list")
        return tuple(_coerce(key, v, arguments[0]) for v in value)
    if origin is not None and issubclass(origin, Mapping):
        require(isinstance(value, Mapping), f"{key}={value!r} must be a mapping")
        return {str(k): _coerce(f"{key}.{k}", v, arguments[1]) for k, v in value.items()}
    if kind is object:
        return value
    if kind is bool:
        require(isinstance(value, bool), f"{key}={value!r} must be true or false")
        return value
    if kind in (int, float):
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError):
            number = None
        require(
            number is not None
            and math.isfinite(number)
            and (kind is float or number == int(number)),
            f"{key}={value!r} must be {_A[kind]}",
        )
        return value if kind is int and isinstance(value, int) else kind(typing.cast(float, number))
    require(isinstance(value, str), f"{key}={value!r} must be {_A[kind]}")
    return value


_A = {int: "a whole number", float: "a number", str: "a string (quote it in YAML)"}
