"""A real sglang-router before servers that replay recorded exchanges: who is lost behind it is
found, left out and let in again; no SGLang server is needed."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from rest_mega.config import ConfigError
from rest_mega.rollout.engine import Completion, Request, Sampling
from rest_mega.rollout.sglang_engine import SglangEngine
from tests.support.models import save_model
from tests.support.sglang import PYTHON, ReplayServer, recorded, server_config

pytestmark = pytest.mark.engine

ANSWER = "generate_stop_token_ids"
END = 319
ROUTES = {
    "/update_weights_from_tensor": ["end_weight_update"],
    "/weights_checker": ["weights_checker_checksum"],
    "/health_generate": ["ready"],
    "/health": ["ready"],
    "/generate": [ANSWER],
}


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[ReplayServer]]]:
    """An engine whose requests go through a router to two replayed servers."""
    from transformers import AutoModelForCausalLM

    if not PYTHON.exists():
        pytest.skip(f"no SGLang in {PYTHON}: run `make sglang` first")
    folder = tmp_path_factory.mktemp("router")
    model = save_model(folder / "model", "qwen3", vocab_size=512, num_hidden_layers=1)
    with ExitStack() as stack:
        servers = [stack.enter_context(ReplayServer(ROUTES, device="cuda")) for _ in range(2)]
        engine = make_engine(folder, tuple(server.url for server in servers), "start")
        stack.callback(engine.close)
        weights = AutoModelForCausalLM.from_pretrained(model).named_parameters()
        engine.load_parameters(weights, 5)
        yield engine, servers


def make_engine(folder: Path, urls: tuple[str, ...], router: str) -> SglangEngine:
    return SglangEngine(
        server_config(urls=urls, router=router, start_timeout_s=90, health_s=0.5, verify=False),
        model_path=str(folder / "model"),
        dtype="fp32",
        end_of_turn_ids=(END,),
        device="cpu",
        folder=folder / "servers",
    )


def played(engine: SglangEngine, count: int) -> list[Completion]:
    """Turns of different prompts."""
    asked = [Request(np.arange(n, n + 9, dtype=np.int32), 20, n) for n in range(count)]
    return engine.generate(asked, Sampling())


def wait_until_refused(url: str) -> None:
    """Nobody listens at `url` any more."""
    place = urlsplit(url)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            socket.create_connection((place.hostname, place.port), timeout=1).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    raise AssertionError(f"{url} still listens")


def assert_answered(turns: list[Completion]) -> None:
    ids = recorded(ANSWER)[1]["output_ids"]
    for turn in turns:
        assert turn.ids_T.tolist() == ids
        assert set(turn.version_T) == {5}


def test_a_server_lost_behind_the_router_is_left_out_and_comes_back(routed: Any) -> None:
    """It breaks two connections and fails its first health check, then it is sound."""
    engine, (victim, other) = routed
    for route in ("/generate", "/health_generate"):
        victim.next(route, "generate_err_oov", "generate_err_oov")
    assert_answered(played(engine, 12))
    engine.settle()
    assert engine.losses == 1
    before = [len(server.bodies("/generate")) for server in (victim, other)]
    for _ in range(10):
        assert_answered(played(engine, 12))
        now = [len(server.bodies("/generate")) for server in (victim, other)]
        if all(map(int.__gt__, now, before)):
            break
    assert all(map(int.__gt__, now, before))
    for server in (victim, other):  # the control plane did not go through the router
        assert server.bodies("/pause_generation")


def test_a_router_that_is_killed_is_started_again(routed: Any) -> None:
    engine, _ = routed
    losses = engine.losses
    os.kill(engine.router.pid, signal.SIGKILL)
    wait_until_refused(engine.router.client.url)  # a dying one may still answer
    assert_answered(played(engine, 4))
    assert engine.losses == losses


def test_a_router_that_asks_servers_which_we_do_not_load_is_refused(
    routed: Any, tmp_path: Path
) -> None:
    engine, (server, _) = routed
    save_model(tmp_path / "model", "qwen3", vocab_size=512, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"also asks .*weights that we never load"):
        make_engine(tmp_path, (server.url,), engine.router.client.url)
