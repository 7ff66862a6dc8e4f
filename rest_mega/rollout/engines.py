"""The table of engines: a name in the config -> an Engine. Heavy imports happen inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rest_mega.config import RolloutConfig, one_of
from rest_mega.data.tokenizer import Tokenizer
from rest_mega.rollout.engine import Engine
from rest_mega.rollout.sglang_placement import Machine, place_servers


def make_engine(
    config: RolloutConfig,
    *,
    model_path: str,
    dtype: str,
    tokenizer: Tokenizer,
    device: Any,
    folder: Path,
    machine: Machine,
) -> Engine:
    """The engine that `rollout.engine` names. Servers write their logs into `folder` and keep a
    copy of the weights there; `machine` has the GPUs that they may get."""
    one_of("rollout.engine", config.engine, ENGINES)
    return ENGINES[config.engine](
        config,
        model_path=model_path,
        dtype=dtype,
        tokenizer=tokenizer,
        device=device,
        folder=folder,
        machine=machine,
    )


def _embedded(
    config: RolloutConfig,
    *,
    model_path: str,
    dtype: str,
    tokenizer: Tokenizer,
    device: Any,
    **_: Any,
) -> Engine:
    from rest_mega.rollout.embedded_engine import EmbeddedEngine

    return EmbeddedEngine(
        model_path,
        end_of_turn_ids=tokenizer.end_of_turn_ids,
        pad_id=tokenizer.pad_id,
        batch_size=config.batch_size,
        dtype=dtype,
        device=device,
    )


def _replay(config: RolloutConfig, **_: Any) -> Engine:
    from rest_mega.rollout.replay_engine import ReplayEngine

    return ReplayEngine(config.replay)


def _sglang(
    config: RolloutConfig,
    *,
    model_path: str,
    dtype: str,
    tokenizer: Tokenizer,
    device: Any,
    folder: Path,
    machine: Machine,
) -> Engine:
    from rest_mega.rollout.sglang_engine import SglangEngine

    return SglangEngine(
        config.sglang,
        model_path=model_path,
        dtype=dtype,
        end_of_turn_ids=tokenizer.end_of_turn_ids,
        device=str(device),
        folder=folder,
        gpus=place_servers(config.sglang, machine, device.type),
    )


ENGINES: dict[str, Callable[..., Engine]] = {
    "embedded": _embedded,
    "replay": _replay,
    "sglang": _sglang,
}
