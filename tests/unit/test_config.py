"""The config tells value, rule and remedy for whatever it refuses, and takes nothing by halves."""

from __future__ import annotations

import ast
import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from rest_mega import config as module
from rest_mega.config import (
    EXTENSIBLE,
    ConfigError,
    EndpointConfig,
    ParallelConfig,
    RunConfig,
    SglangConfig,
    known_keys,
)

SECTIONS = typing.get_type_hints(RunConfig)


def refused(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(tree)
    return str(caught.value)


def build(key: str, value: Any) -> Any:
    section, name = key.split(".")
    config = RunConfig.from_dict({section: {name: value}})
    return getattr(getattr(config, section), name)


def test_an_empty_tree_is_the_defaults() -> None:
    assert RunConfig.from_dict({}) == RunConfig()


def test_a_tree_survives_the_round_trip_through_plain_dictionaries() -> None:
    config = RunConfig.from_dict(
        {"credit": {"tau": 0.5}, "rewards": {"parts": {"success": 2}}, "parallel": {"tensor": 4}}
    )
    assert RunConfig.from_dict(config.to_dict()) == config


def test_a_section_whose_keys_are_commented_out_is_its_defaults() -> None:
    assert RunConfig.from_dict({"run": None}) == RunConfig()


# ------------------------------------------------------------------ unknown keys


@pytest.mark.parametrize(
    ("tree", "near"),
    [
        ({"paralel": {"tensor": 2}}, "parallel"),
        ({"parallel": {"tensr": 2}}, "parallel.tensor"),
        ({"rollout": {"sample_per_prompt": 2}}, "rollout.samples_per_prompt"),
        ({"model": {"zzzz": 1}}, "known keys: model.path, "),
        ({"optimizer": {"learning_rate": 1}}, "known keys: optimizer.name, "),
        ({"run": {"temperature": 1}}, "rollout.temperature"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(tree: dict[str, Any], near: str) -> None:
    (section, value) = next(iter(tree.items()))
    key = f"{section}.{next(iter(value))}" if section in SECTIONS else section
    message = refused(tree)
    assert f"unknown config key {key!r}" in message
    assert near in message


def test_what_belongs_to_another_section_is_found_there() -> None:
    assert "did you mean rollout.max_new_tokens" in refused({"run": {"max_new_tokens": 1}})


# ------------------------------------------------------------------ types


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("run.steps", "many", "a whole number"),
        ("run.steps", 2.5, "a whole number"),
        ("run.steps", True, "a whole number"),
        ("run.steps", None, "a whole number"),
        ("run.steps", float("nan"), "a whole number"),
        ("run.steps", float("inf"), "a whole number"),
        ("run.steps", [1], "a whole number"),
        ("optimizer.lr", "fast", "a number"),
        ("optimizer.weight_decay", float("nan"), "a number"),
        ("credit.w_max", float("inf"), "a number"),
        ("credit.tau", "hot", "a number"),
        ("run.fresh", "yes", "true or false"),
        ("run.fresh", 1, "true or false"),
        ("model.path", 7, "a string"),
        ("model.path", None, "a string"),
        ("environment.modules", "desk.py", "a list"),
        ("rewards.parts", ["format"], "a mapping"),
        ("rewards.parts", {"format": "much"}, "a number"),
    ],
)
def test_a_wrong_type_is_refused_with_the_value(key: str, value: Any, rule: str) -> None:
    section, name = key.split(".")
    message = refused({section: {name: value}})
    shown = value["format"] if isinstance(value, dict) else value
    assert message.startswith(key)
    assert repr(shown) in message
    assert rule in message


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_must_be_a_mapping(section: str) -> None:
    assert refused({section: 3}) == f"{section} must be a mapping, not 3"


@pytest.mark.parametrize(
    ("key", "given", "taken"),
    [
        ("optimizer.lr", "1e-3", 1e-3),  # YAML 1.1 reads 1e-3 as a string
        ("optimizer.lr", 1, 1.0),
        ("run.steps", 3.0, 3),
        ("run.steps", "3", 3),
        ("credit.tau", None, None),
        ("environment.modules", ["a.py"], ("a.py",)),
    ],
)
def test_conversions_are_the_lossless_ones(key: str, given: Any, taken: Any) -> None:
    got = build(key, given)
    assert (got, type(got)) == (taken, type(taken))


# ------------------------------------------------------------------ ranges

BAD: list[tuple[str, Any, str]] = [
    ("model.dtype", "fp8", "bf16"),
    ("model.layers", "apex", "local"),
    ("model.recompute", "some", "selective"),
    ("model.head", "tritn", "triton"),
    ("model.init", "ones", "random"),
    ("parallel.tensor", 0, "at least 1"),
    ("parallel.pipeline", -1, "at least 1"),
    ("parallel.context", 0, "at least 1"),
    ("parallel.expert", 0, "at least 1"),
    ("parallel.virtual_pipeline", 0, "at least 1"),
    ("parallel.virtual_pipeline", 2, "parallel.pipeline > 1"),
    ("parallel.sequence", True, "parallel.sequence=false"),
    ("deadlines.train", 0, "positive"),
    ("deadlines.rollout", -1, "positive"),
    ("optimizer.name", "adamw", "adam"),
    ("optimizer.name", "muon", "optimizer.distributed=false"),
    ("optimizer.name", "sgd", "optimizer.distributed=false"),
    ("optimizer.decay", "exp", "cosine"),
    ("optimizer.lr", 0, "positive"),
    ("optimizer.muon_lr", -1, "positive"),
    ("optimizer.eps", 0, "positive"),
    ("optimizer.beta1", 1, "[0, 1)"),
    ("optimizer.beta2", -0.1, "[0, 1)"),
    ("optimizer.weight_decay", -0.1, "not be negative"),
    ("optimizer.min_lr_ratio", 1.5, "[0, 1]"),
    ("optimizer.warmup_steps", -1, "not be negative"),
    ("optimizer.clip_grad", -1, "not be negative"),
    ("environment.call_timeout_s", 0, "positive"),
    ("environment.result_characters", 0, "positive"),
    ("environment.calls_per_turn", 0, "positive"),
    ("rollout.engine", "vllm", "embedded"),
    ("rollout.engine", "replay", "rollout.replay=FOLDER"),
    ("rollout.prompts_per_step", 0, "at least 1"),
    ("rollout.samples_per_prompt", 0, "at least 1"),
    ("rollout.max_turns", 0, "at least 1"),
    ("rollout.max_new_tokens", 0, "at least 1"),
    ("rollout.max_tokens", 0, "at least 1"),
    ("rollout.max_tokens", 5000, "packing.tokens"),
    ("rollout.batch_size", 0, "at least 1"),
    ("rollout.temperature", 0, "positive"),
    ("rollout.top_p", 0, "(0, 1]"),
    ("rewards.parts", {}, "at least one"),
    ("rewards.parts", {"format": 0.0}, "no coefficient besides 0"),
    ("credit.preset", "ppo", "uniform"),
    ("credit.advantage", "gae", "rloo"),
    ("credit.entropy_momentum", 1, "[0, 1)"),
    ("credit.equal_groups", "skip", "resample"),
    ("credit.resample_rounds", 0, "credit.equal_groups=drop"),
    ("guard.every", -1, "not be negative"),
    ("guard.mean", 0.0, "must be positive"),
    ("guard.p99", -0.5, "must be positive"),
    ("guard.max", 0.0, "null switches it off"),
    ("run.until", -1, "between 0 and run.steps=100"),
    ("run.until", 101, "between 0 and run.steps=100"),
    ("loss.policy", "grpo", "reinforce"),
    ("loss.old_logprobs", "engine", "rollout"),
    ("loss.clip_low", 1, "(0, 1)"),
    ("loss.clip_high", 0, "positive"),
    ("loss.dual_clip", 0.5, "0 (off) or greater than 1"),
    ("loss.aggregation", "mean", "token-mean"),
    ("loss.fixed_length", 0, "at least 1"),
    ("loss.correction", "icepop", "sequence-mask"),
    ("loss.correction_high", 0, "0 <= low < high"),
    ("loss.correction_low", -0.5, "0 <= low < high"),
    ("loss.optimizer_steps", 0, "at least 1"),
    ("loss.optimizer_steps", 65, "8 prompts x 8 samples"),
    ("packing.tokens", 0, "at least 1"),
    ("sft.dialogues_per_step", 0, "at least 1"),
    ("evaluation.every", -1, "not be negative"),
    ("evaluation.prompts", 0, "at least 1"),
    ("credit.rule", "entropie", "nearest: entropy"),
    ("credit.tokens", "high_entropy", "nearest: high-entropy"),
    ("credit.high_entropy_share", 0.0, "(0, 1]"),
    ("credit.high_entropy_share", 1.5, "(0, 1]"),
    ("credit.clip_cov_share", 0.0, "(0, 1]"),
    ("credit.clip_cov_low", 6.0, "credit.clip_cov_high=5.0"),
    ("credit.shaping_alpha", -0.1, "not be negative"),
    ("credit.shaping_kappa", 1.0, "greater than 1"),
    ("credit.kl_cov_share", 0.0, "(0, 1]"),
    ("credit.kl_cov_coefficient", -1.0, "not be negative"),
    ("credit.kl_reward", -0.1, "not be negative"),
    ("credit.kl_reward_estimator", "k4", "k1, k2, k3"),
    ("loss.kl", -0.1, "not be negative"),
    ("loss.kl_estimator", "kl", "k1, k2, k3"),
    ("loss.entropy_bonus", -0.1, "not be negative"),
    ("telemetry.console", "loud", "plain"),
    ("telemetry.trajectories", -1, "not be negative"),
    ("run.device", "tpu", "cuda"),
    ("run.steps", -1, "not be negative"),
    ("run.save_every", -1, "not be negative"),
    ("run.keep_checkpoints", 0, "at least 1"),
    ("run.seed", -1, "[0, 2^31)"),
    ("run.seed", 2**31, "[0, 2^31)"),
]


@pytest.mark.parametrize(("key", "value", "rule"), BAD)
def test_a_value_out_of_range_is_refused_with_key_value_and_rule(
    key: str, value: Any, rule: str
) -> None:
    section, name = key.split(".")
    message = refused({section: {name: value}})
    for part in (name, str(value) if value != {} else "empty", rule):
        assert part.lower() in message.lower(), message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.warmup_steps", 0),
        ("optimizer.clip_grad", 0.0),
        ("optimizer.beta1", 0.0),
        ("loss.dual_clip", 0.0),
        ("rollout.top_p", 1.0),
        ("run.steps", 0),
        ("run.seed", 2**31 - 1),
        ("telemetry.trajectories", 0),
    ],
)
def test_the_edges_of_a_range_belong_to_it(key: str, value: Any) -> None:
    assert build(key, value) == value


def test_the_names_in_the_config_are_those_of_the_tables() -> None:
    from rest_mega.credit.advantages import METHODS, TOKENS
    from rest_mega.credit.weights import PRESETS, RULES
    from rest_mega.losses.policy import SURROGATES

    tables = {"preset": PRESETS, "rule": RULES, "tokens": TOKENS, "advantage": METHODS}
    for key, table in tables.items():
        for name in table:
            tree = {"credit": {key: name}, "loss": {"optimizer_steps": 2}}  # kl-cov needs two
            assert getattr(RunConfig.from_dict(tree).credit, key) == name
        assert f"choose one of {', '.join(table)}" in refused({"credit": {key: "other"}})
    assert f"choose one of {', '.join(EXTENSIBLE['loss.policy'])}" in refused(
        {"loss": {"policy": "other"}}
    )
    assert list(SURROGATES.keys() ^ set(EXTENSIBLE["loss.policy"])) == []


def test_files_that_may_register_more_names_leave_the_check_to_the_start() -> None:
    """What they register is checked when they are loaded, before the ranks meet."""
    tree = {"environment": {"modules": ["mine.py"]}, "loss": {"policy": "mine"}}
    assert RunConfig.from_dict(tree).loss.policy == "mine"


def test_leaving_out_the_scoring_pass_is_refused_where_the_gradient_would_change() -> None:
    loss = {"scoring": False, "optimizer_steps": 2}
    assert "loss.optimizer_steps=2 has no old log-probs" in refused({"loss": loss})
    RunConfig.from_dict({"loss": loss | {"old_logprobs": "rollout"}})
    RunConfig.from_dict({"loss": {"scoring": False}})
    corrected = refused({"loss": {"scoring": False, "correction": "tis"}})
    assert "set loss.scoring=true or loss.correction=none" in corrected


@pytest.mark.parametrize("tokens", ["high-entropy", "clip-cov", "kl-cov", "entropy-advantage"])
def test_credit_of_single_tokens_is_refused_without_their_scores(tokens: str) -> None:
    message = refused({"loss": {"scoring": False}, "credit": {"tokens": tokens}})
    assert f"credit.tokens={tokens}" in message
    assert "set loss.scoring=true or credit.tokens=all" in message


def test_global_advantages_are_refused_where_groups_have_nothing_to_say() -> None:
    resampled = refused({"credit": {"advantage": "reinforce++", "equal_groups": "resample"}})
    assert "set credit.equal_groups=drop or credit.advantage=reinforce++-baseline" in resampled
    tree = {"rollout": {"samples_per_prompt": 1}, "credit": {"advantage": "reinforce++-baseline"}}
    assert "set rollout.samples_per_prompt to 2 or more" in refused(tree)
    tree["credit"] = {"advantage": "reinforce++"}
    RunConfig.from_dict(tree)


def test_a_run_ends_at_its_last_step_or_where_it_is_told_to_pause() -> None:
    for until, last in ((None, 9), (3, 3), (0, 0)):
        assert RunConfig.from_dict({"run": {"steps": 9, "until": until}}).run.last_step == last


def test_the_estimators_in_the_config_are_those_of_the_table() -> None:
    from rest_mega.config import KL_ESTIMATORS
    from rest_mega.losses.kl import ESTIMATORS

    assert tuple(ESTIMATORS) == KL_ESTIMATORS
    for key in ("loss.kl_estimator", "credit.kl_reward_estimator"):
        assert [build(key, name) for name in ESTIMATORS] == list(ESTIMATORS)


def test_a_kl_on_the_reward_is_refused_without_scores_and_one_in_the_loss_is_not() -> None:
    message = refused({"loss": {"scoring": False}, "credit": {"kl_reward": 0.1}})
    assert "set loss.scoring=true or credit.kl_reward=0 (loss.kl needs no scores)" in message
    RunConfig.from_dict({"loss": {"scoring": False, "kl": 0.1, "entropy_bonus": 0.1}})


def test_kl_cov_is_refused_where_nothing_can_have_moved() -> None:
    tree = {"credit": {"tokens": "kl-cov"}}
    assert "set loss.optimizer_steps above 1, loss.old_logprobs=rollout" in refused(tree)
    for loss in ({"optimizer_steps": 2}, {"old_logprobs": "rollout"}):
        RunConfig.from_dict(tree | {"loss": loss})


def test_the_reference_is_needed_by_its_three_users_alone() -> None:
    assert not RunConfig.from_dict({"model": {"reference": "folder"}}).needs_reference
    users = ({"loss": {"kl": 0.1}}, {"credit": {"kl_reward": 0.1}})
    for tree in (*users, {"telemetry": {"reference_kl": True}}):
        assert RunConfig.from_dict(tree).needs_reference


def test_muon_in_bf16_is_refused() -> None:
    tree = {"optimizer": {"name": "muon", "distributed": False}, "model": {"dtype": "bf16"}}
    assert "not model.dtype=bf16: set model.dtype=fp32" in refused(tree)


def test_a_correction_takes_its_own_band_where_none_is_given() -> None:
    bands = {
        name: RunConfig.from_dict({"loss": {"correction": name}}).loss.correction_band
        for name in ("tis", "mis", "sequence-mask")
    }
    assert bands == {"tis": (0.0, 2.0), "mis": (0.5, 5.0), "sequence-mask": (0.95, 1.05)}
    given = {"correction": "mis", "correction_low": 0.9, "correction_high": 1.5}
    assert RunConfig.from_dict({"loss": given}).loss.correction_band == (0.9, 1.5)


@pytest.mark.parametrize("name", ["tis", "mis"])
def test_a_ratio_that_would_count_twice_is_refused(name: str) -> None:
    tree = {"loss": {"correction": name, "old_logprobs": "rollout"}}
    assert "set loss.old_logprobs=trainer or loss.correction=none" in refused(tree)


def test_a_band_that_masks_what_agrees_is_refused() -> None:
    tree = {"loss": {"correction": "sequence-mask", "correction_low": 1.01}}
    assert "must have 1 between them" in refused(tree)


# ------------------------------------------------------------------ the world


@pytest.mark.parametrize(("world", "replicas"), [(4, 1), (8, 2), (12, 3)])
def test_the_world_size_leaves_the_replicas(world: int, replicas: int) -> None:
    assert ParallelConfig(tensor=2, context=2).data_parallel(world) == replicas


@pytest.mark.parametrize("world", [1, 2, 6])
def test_a_world_that_does_not_divide_is_refused_with_the_remedy(world: int) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(tensor=2, context=2).data_parallel(world)
    for part in (f"world size {world}", "tensor 2", "context 2", "= 4", "launch a multiple of 4"):
        assert part in str(caught.value)


def test_prompts_that_replicas_cannot_share_are_refused() -> None:
    config = RunConfig.from_dict({"rollout": {"prompts_per_step": 3}})
    with pytest.raises(ConfigError, match=r"prompts_per_step=3 .* 2 .*use a multiple of 2"):
        config.check_world(2)
    config.check_world(3)


# ------------------------------------------------------------------ documentation


def documented(path: Path) -> dict[str, set[str]]:
    """Class -> its fields that are followed by a docstring."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        after = zip(node.body, node.body[1:], strict=False)
        found[node.name] = {
            one.target.id
            for one, two in after
            if isinstance(one, ast.AnnAssign)
            and isinstance(one.target, ast.Name)
            and isinstance(two, ast.Expr)
            and isinstance(two.value, ast.Constant)
            and isinstance(two.value.value, str)
        }
    return found


def test_every_field_is_documented_under_it() -> None:
    texts = documented(Path(module.__file__))
    nested = [("rollout.sglang", SglangConfig), ("evaluation.endpoint", EndpointConfig)]
    for name, kind in [*SECTIONS.items(), *nested]:
        assert {f.name for f in dataclasses.fields(kind)} == texts[kind.__name__], name


def test_the_known_keys_are_the_leaves_of_the_tree() -> None:
    tree = RunConfig().to_dict()
    nested = {"rollout.sglang": tree["rollout"]["sglang"]}
    nested["evaluation.endpoint"] = tree["evaluation"]["endpoint"]
    leaves = []
    for whole in (f"{section}.{key}" for section in tree for key in tree[section]):
        leaves += [f"{whole}.{key}" for key in nested[whole]] if whole in nested else [whole]
    assert known_keys() == leaves


# ------------------------------------------------------------------ SGLang's own arguments


def test_what_sglang_section_does_not_know_is_an_argument_of_the_server() -> None:
    tree = {"servers": 2, "mem_fraction_static": 0.1, "tp_size": 2, "lora_paths": ["a"]}
    config = RunConfig.from_dict({"rollout": {"engine": "sglang", "sglang": tree}})
    sglang = config.rollout.sglang
    assert sglang.servers == 2
    assert sglang.arguments == {"mem_fraction_static": 0.1, "tp_size": 2, "lora_paths": ["a"]}
    assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"transport": "carrier"}, "rollout.sglang.transport='carrier' is not known"),
        ({"servers": 0}, "rollout.sglang.servers=0 must be at least 1"),
        ({"health_s": 0}, "rollout.sglang.health_s=0.0 must be positive"),
        ({"restarts": -1}, "rollout.sglang.restarts=-1 must not be negative"),
        ({"urls": ["host:30000"]}, "rollout.sglang.urls has 'host:30000'; write http://host:port"),
        ({"arguments": 3}, "rollout.sglang.arguments=3 must be a mapping"),
        ({"router": "auto"}, "rollout.sglang.router='auto' must be start, http://host:port or"),
        ({"gpus": [1, 1]}, "rollout.sglang.gpus=[1, 1] must name each GPU once"),
        ({"gpus": [-1]}, "rollout.sglang.gpus=[-1] must name each GPU once, from 0 on"),
        ({"gpus": [1], "urls": ["http://h:1"]}, "leave out rollout.sglang.gpus and colocate"),
        ({"colocate": True, "urls": ["http://h:1"]}, "leave out rollout.sglang.gpus and colocate"),
        ({"gpus": [1], "colocate": True}, "leave out rollout.sglang.gpus=[1]"),
        ({"colocate": True, "transport": "distributed"}, "use transport=tensor"),
        ({"tp_size": 0}, "rollout.sglang.tp_size=0 must be a whole number"),
        ({"tensor_parallel_size": "a"}, "tensor_parallel_size='a' must be a whole number"),
    ],
)
def test_a_setting_of_our_own_that_cannot_be_is_refused(tree: dict[str, Any], message: str) -> None:
    assert message in refused({"rollout": {"sglang": tree}})
