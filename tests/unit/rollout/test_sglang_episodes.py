"""The engine over replayed servers: turns from pieces, lost servers, and who is asked."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rest_mega.config import ConfigError, SglangConfig
from rest_mega.rollout.engine import Completion, Request, Sampling
from rest_mega.rollout.sglang_client import ServerInfo, ServerRefused
from rest_mega.rollout.sglang_engine import SglangEngine
from rest_mega.rollout.sglang_transports import Broadcast
from rest_mega.rollout.sglang_worker import STICK, Worker, choose
from tests.support.models import save_model
from tests.support.sglang import ReplayServer, recorded

END = 319
VERSION = 5
LOADABLE = {
    "/update_weights_from_tensor": ["end_weight_update"],
    "/weights_checker": ["weights_checker_checksum"],
    "/health_generate": ["ready"],
}


def request(length: int = 20, *ids: int) -> Request:
    return Request(np.array(ids or (1, 2, 3), dtype=np.int32), length, 7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("qwen3"), "qwen3", vocab_size=512, num_hidden_layers=1
    )


@contextmanager
def playing(
    model: Path, tmp_path: Path, *generate: list[str], hung: bool = False, **settings: Any
) -> Iterator[tuple[Any, list[Any]]]:
    """An engine that is attached to one replayed server for each list of answers to /generate;
    `hung`: the first never generates, though it is ready."""
    from transformers import AutoModelForCausalLM

    # Recorded checksums are those of another model.
    servers = [ReplayServer(LOADABLE | {"/generate": g}, device="cuda") for g in generate]
    if hung:
        silent = LOADABLE | {"/generate": ["silence"], "/health_generate": ["silence"]}
        servers[0] = ReplayServer(silent, device="cuda")
    for server in servers:
        server.__enter__()
    urls = tuple(s.url for s in servers)
    settings = {"verify": False, "start_timeout_s": 5, "health_s": 0.3} | settings
    config = SglangConfig(urls=urls, **settings)
    engine = SglangEngine(
        config,
        model_path=str(model),
        dtype="fp32",
        end_of_turn_ids=(END,),
        device="cpu",
        folder=tmp_path,
    )
    weights = AutoModelForCausalLM.from_pretrained(model).named_parameters()
    try:
        engine.load_parameters(weights, VERSION)
        yield engine, servers
    finally:
        engine.close()
        for server in servers:
            server.__exit__()


def test_an_aborted_turn_goes_on_from_what_it_had_reached(model: Path, tmp_path: Path) -> None:
    names = ["abort_victim", "generate_stop_token_ids"]
    with playing(model, tmp_path, names) as (engine, (server,)):
        (done,) = engine.generate([request()], Sampling(0.7))
        first, second = server.bodies("/generate")
    start, rest = (recorded(name)[1] for name in names)
    assert done.ids_T.tolist() == start["output_ids"] + rest["output_ids"]
    logprobs = [
        row[0] for part in (start, rest) for row in part["meta_info"]["output_token_logprobs"]
    ]
    np.testing.assert_array_equal(done.logprobs_T, np.array(logprobs, np.float32))
    assert done.finished
    assert first["input_ids"] == [1, 2, 3]
    assert second["input_ids"] == [1, 2, 3, *start["output_ids"]]
    assert first["rid"] != second["rid"]
    assert first["sampling_params"] == {
        "max_new_tokens": 20, "temperature": 0.7, "top_p": 1.0, "top_k": -1,
        "stop_token_ids": [END], "sampling_seed": 7,
    }  # fmt: skip
    assert second["sampling_params"]["max_new_tokens"] == 12


def test_a_turn_that_reaches_its_limit_is_unfinished_and_spans_two_versions(
    model: Path, tmp_path: Path
) -> None:
    with playing(model, tmp_path, ["pause_retract_victim"]) as (engine, _):
        (done,) = engine.generate([request(8)], Sampling(greedy=True))
    assert not done.finished
    assert done.version_T.tolist() == [6] * 4 + [7] * 4


def test_an_episode_goes_on_while_another_decodes(model: Path, tmp_path: Path) -> None:
    """The second turn of one episode is asked for although the other one's first never ends."""
    reached = threading.Event()

    def follow(index: int, done: Completion) -> Request | None:
        if len(asked) == 2:
            reached.set()
            raise KeyError("seen enough")
        asked.append(index)
        return request(20, 1, 2, 3, 4)

    asked: list[int] = []
    names = ["silence", "generate_stop_token_ids"]
    with playing(model, tmp_path, names) as (engine, (server,)):
        with pytest.raises(KeyError, match="seen enough"):
            engine.play([request(), request(20, 9, 9)], Sampling(), follow)
        deadline = time.monotonic() + 5
        while not server.bodies("/abort_request") and time.monotonic() < deadline:
            time.sleep(0.01)
        (aborted,) = server.bodies("/abort_request")
        silent = server.bodies("/generate")[0]
    assert reached.is_set()
    assert len(set(asked)) == 1
    assert aborted["rid"] == silent["rid"]  # what nobody waits for is not left running


def test_a_turn_whose_server_is_lost_is_asked_of_another_and_counted_once(
    model: Path, tmp_path: Path
) -> None:
    broken, sound = ["generate_err_oov"], ["generate_stop_token_ids"]
    with playing(model, tmp_path, broken, sound) as (engine, servers):
        turns: list[int] = []
        engine.play([request()] * 6, Sampling(), lambda i, done: turns.append(i))
        assert sorted(turns) == list(range(6))
        assert engine.answered == [0, 6]
        lost = len(servers[0].bodies("/generate"))
        assert lost + 6 == sum(len(s.bodies("/generate")) for s in servers)
        assert lost >= 1


def test_a_hung_server_is_given_up_and_its_turns_are_asked_of_another(
    model: Path, tmp_path: Path
) -> None:
    names = ["generate_stop_token_ids"]
    with playing(model, tmp_path, names, names, hung=True) as (engine, servers):
        turns: list[int] = []
        engine.play([request()] * 6, Sampling(), lambda i, done: turns.append(i))
        assert sorted(turns) == list(range(6))
        assert engine.answered == [0, 6]
        hung = [body["rid"] for body in servers[0].bodies("/generate")]
        assert hung
        assert len(hung) + len(servers[1].bodies("/generate")) == 6 + len(hung)


def test_a_server_that_comes_back_under_another_version_is_given_the_weights(
    model: Path, tmp_path: Path
) -> None:
    names = ["generate_err_oov", "generate_stop_token_ids"]
    with playing(model, tmp_path, names) as (engine, (server,)):
        before = len(server.bodies("/update_weights_from_tensor"))
        server._version = "default"  # its operator has started it anew
        (done,) = engine.generate([request()], Sampling())
        assert done.finished
        assert len(server.bodies("/update_weights_from_tensor")) == 2 * before
        versions = [body["new_version"] for body in server.bodies("/update_weight_version")]
        assert versions[-1] == str(VERSION)
        assert engine.losses == 1


def test_requests_that_no_server_survives_are_refused_before_they_are_sent(
    model: Path, tmp_path: Path
) -> None:
    with playing(model, tmp_path, ["generate_stop_token_ids"]) as (engine, (server,)):
        for ids, length, message in (
            ([5, 512], 4, "token id 512 is not among the model's 512"),
            ([-1], 4, "token id -1 is not among"),
            ([1] * 2040, 3, "2040 tokens and up to 3 new ones .* takes 1 to 2042"),
            ([1], 0, "1 tokens and up to 0 new ones"),
        ):
            with pytest.raises(ConfigError, match=message):
                engine.generate([request(), request(length, *ids)], Sampling())
        with pytest.raises(ConfigError, match="token id 600"):
            engine.play([request()], Sampling(), lambda i, done: request(4, 600))
        assert len(server.bodies("/generate")) == 1  # the last play's first turn


def test_a_refused_request_ends_the_play_with_the_servers_words(
    model: Path, tmp_path: Path
) -> None:
    with (
        playing(model, tmp_path, ["generate_err_badparam"]) as (engine, _),
        pytest.raises(ServerRefused, match="temperature must be"),
    ):
        engine.generate([request()], Sampling())


def test_weights_are_loaded_in_their_bracket_between_pause_and_continue(
    model: Path, tmp_path: Path
) -> None:
    with playing(model, tmp_path, ["generate_stop_token_ids"]) as (engine, (server,)):
        routes = [route for route, _ in server.asked]
        assert engine.version == VERSION
        first = routes.index("/pause_generation")
        assert [r for r in routes[first:] if r != "/model_info"] == [
            "/pause_generation", "/flush_cache", "/update_weight_version", "/end_weight_update",
            "/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update",
            "/update_weight_version", "/continue_generation",
        ]  # fmt: skip


class Held(Broadcast):
    """A broadcast's buckets, sent to nobody: only what is held meanwhile counts."""

    async def begin(self, workers: Any) -> None:
        """No group."""

    async def send(self, worker: Any, prepared: Any) -> None:
        """The bucket before is being loaded while the next is gathered."""
        await asyncio.sleep(0.05)

    async def share(self, prepared: Any) -> None:
        """No group."""


def alive() -> int:
    """Bytes of the storages of all tensors that the garbage collector knows."""
    tensors = (one for one in gc.get_objects() if type(one) is torch.Tensor)
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@pytest.fixture
def few_objects() -> Iterator[None]:
    """`alive` walks what is made from here on, not the heap of the whole session."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("few_objects")
def test_a_load_holds_two_buckets_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the two there is the tensor that a full bucket has no room for."""
    model = save_model(tmp_path / "model", "qwen3", vocab_size=512, num_hidden_layers=6)
    with playing(model, tmp_path, ["generate_stop_token_ids"]) as (engine, _):
        shapes = dict(engine._shapes)
        sizes = sorted(4 * math.prod(shape) for shape in shapes.values())
        limit, before, held = sizes[-1], alive(), list[int]()
        transport = Held("127.0.0.1", 5, "cpu")
        monkeypatch.setattr(transport, "bucket_bytes", lambda _: limit)
        monkeypatch.setattr(engine, "_transport", transport)

        def gathered() -> Iterator[tuple[str, torch.Tensor]]:
            for name in sorted(shapes, key=lambda name: -math.prod(shapes[name])):
                tensor = torch.ones(shapes[name])
                held.append(alive() - before)
                yield name, tensor

        engine.load_parameters(gathered(), VERSION + 1)
    assert sum(sizes) > 5 * limit
    assert limit < max(held) <= 2 * limit + sizes[-2]


def test_weights_that_a_server_holds_other_than_they_were_sent_are_refused(
    model: Path, tmp_path: Path
) -> None:
    """The replayed checksums are those of another model."""
    with (
        pytest.raises(RuntimeError, match=r"holds other values of .*rollout\.sglang\.verify=false"),
        playing(model, tmp_path, ["ready"], verify=True, keep_copy=False),
    ):
        pass


def test_weights_that_do_not_fit_are_not_sent_and_nothing_is_played_with_them(
    model: Path, tmp_path: Path
) -> None:
    with playing(model, tmp_path, ["generate_stop_token_ids"]) as (engine, (server,)):
        sent = len(server.bodies("/update_weights_from_tensor"))
        with pytest.raises(ValueError, match="'nonsense' is None by its config"):
            engine.load_parameters([("nonsense", np.zeros(3))], 6)
        assert len(server.bodies("/update_weights_from_tensor")) == sent
        assert server.asked[-1][0] == "/continue_generation"
        assert engine.version == -1
        with pytest.raises(RuntimeError, match="no weights of ours"):
            engine.generate([request()], Sampling())


def test_nothing_is_played_before_weights_are_loaded_and_no_server_is_named(
    model: Path, tmp_path: Path
) -> None:
    config = SglangConfig(urls=("http://127.0.0.1:9",), start_timeout_s=0.3)
    with pytest.raises(ConfigError, match=r"ready at http://127\.0\.0\.1:9 within 0\.3 s; start"):
        SglangEngine(
            config, model_path=str(model), dtype="fp32", end_of_turn_ids=(1,), device="cpu",
            folder=tmp_path,
        )  # fmt: skip


def test_an_episode_stays_where_its_prefix_is_until_another_worker_has_much_less_to_do() -> None:
    def worker(load: int, open_: bool = True) -> Worker:
        made = Worker(None, None, ServerInfo(1, 9, "cpu"), open_)  # type: ignore[arg-type]
        made.running = dict.fromkeys(map(str, range(load)))  # type: ignore[arg-type]
        return made

    home, other = worker(3), worker(1)
    assert choose([home, other], None) is other
    assert choose([home, other], home) is home
    assert choose([worker(0), other, home], home) is home
    home.running = worker(1 + STICK).running
    assert choose([home, other], home) is other
    home.open, home.running = False, {}
    assert choose([home, other], home) is other
    other.open = False
    assert choose([home, other], home) is None
