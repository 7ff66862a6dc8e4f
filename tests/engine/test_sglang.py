"""An unmodified SGLang server on this CPU serves the quick-start's policy: two of them, started
once, behind one engine.

The tests share the servers: each loads the weights that it plays with. The one that kills a server
comes last.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rest_mega.config import ConfigError, EnvironmentConfig, ParallelConfig, RolloutConfig
from rest_mega.data.chat import ChatFormat
from rest_mega.data.prompts import load_prompts
from rest_mega.data.tokenizer import load_tokenizer
from rest_mega.environments import load_modules
from rest_mega.rollout.collect import Collector
from rest_mega.rollout.engine import Completion, Request, Sampling
from rest_mega.rollout.sglang_engine import SglangEngine
from tests.support.agreement import gaps
from tests.support.ranks import run_ranks
from tests.support.rollouts import assert_made_of_its_parts
from tests.support.runs import run_verb
from tests.support.sglang import PYTHON, ROOT, server_config

pytestmark = pytest.mark.engine

QUICKSTART = ROOT / "examples" / "quickstart"
MODEL = str(QUICKSTART / "warm_start")
TOKENIZER = load_tokenizer(str(QUICKSTART / "tokenizer"), "")
CHAT = ChatFormat(TOKENIZER)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngine]:
    """An engine that has started two servers."""
    if not PYTHON.exists():
        pytest.skip(f"no SGLang in {PYTHON}: run `make sglang` first")
    folder = tmp_path_factory.mktemp("servers")
    end = TOKENIZER.end_of_turn_ids
    engine = make_engine(MODEL, None, folder=folder, servers=2, colocate=True, end=end)
    yield engine
    engine.close()


def make_engine(
    path: str, device: Any, *, folder: Path, end: tuple[int, ...] = (), **settings: Any
) -> SglangEngine:
    return SglangEngine(
        server_config(**settings),
        model_path=path,
        dtype="fp32",
        end_of_turn_ids=end,
        device="cpu",
        folder=folder,
    )


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def written(folder: Path, *, held_out: bool) -> Path:
    """A file with two of each kind of the quick-start's tasks."""
    make_data = load_modules([str(QUICKSTART / "make_data.py")])[0]
    file = folder / ("held_out.jsonl" if held_out else "train.jsonl")
    drawn = make_data.prompts("engine", 20, held_out=held_out)
    file.write_text("".join(json.dumps(row) + "\n" for row in drawn))
    return file


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out tasks."""
    return written(tmp_path_factory.mktemp("data"), held_out=True)


@torch.no_grad()
def scores(model: Any, ids_T: Any, temperature: float = 1.0) -> np.ndarray:
    """Log-prob of every token after the first, by a fresh forward pass."""
    ids = torch.from_numpy(ids_T.astype(np.int64))
    logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1] / temperature, dim=-1)
    return np.asarray(logprobs.gather(1, ids[1:, None])[:, 0].numpy())


def assert_scored(model: Any, request: Request, done: Completion) -> None:
    whole = np.concatenate([request.ids_T, done.ids_T])
    want = scores(model, whole)[len(request.ids_T) - 1 :]
    np.testing.assert_allclose(done.logprobs_T, want, atol=TOLERANCE)


def moved(model: Any, factor: float) -> Any:
    """Another policy: every matrix scaled."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(factor if parameter.ndim > 1 else 1.0)
    return other


def asked(count: int, length: int) -> list[Request]:
    rng = np.random.default_rng(3)
    return [
        Request(rng.integers(5, 600, rng.integers(4, 24)).astype(np.int32), length, n)
        for n in range(count)
    ]


def test_turns_with_tool_calls_hold_the_ids_and_logprobs_of_the_policy(
    servers: SglangEngine, model: Any, rows: Path
) -> None:
    prompts = load_prompts(str(rows), "")
    servers.load_parameters(model.named_parameters(), 3)
    before = servers.answered
    config = RolloutConfig(max_turns=5, max_new_tokens=48, max_tokens=256)
    collector = Collector(servers, TOKENIZER, CHAT, "hermes", config, EnvironmentConfig())
    groups = collector.collect(prompts, 2, Sampling(), "seed")
    assert groups is not None
    played = [t for group in groups for t in group]
    assert [(t.prompt.id, t.sibling) for t in played] == [
        (p.id, g) for p in prompts for g in (0, 1)
    ]
    for t in played:
        assert_made_of_its_parts(t, CHAT)
        want = np.append(0, scores(model, t.ids_T))
        np.testing.assert_allclose(t.logprobs_T[t.mask_T], want[t.mask_T], atol=TOLERANCE)
        assert set(t.version_T[t.mask_T]) == {3}
    outcomes = [o.status for t in played for turn in t.turns for o in turn.outcomes]
    assert outcomes.count("ok") > 10
    assert sum(len(t.turns) >= 3 for t in played) > 3
    # Two servers behind the balancer: both were asked, each turn once.
    answered = [now - then for now, then in zip(servers.answered, before, strict=True)]
    assert min(answered) > 5
    assert sum(answered) >= sum(len(t.turns) for t in played)


@pytest.mark.parametrize("transport", ["tensor", "disk", "distributed"])
def test_the_trainer_scores_what_it_published_over_each_transport(
    servers: SglangEngine, transport: str, tmp_path: Path
) -> None:
    from rest_mega.trainer.model import read_architecture

    attach = functools.partial(
        make_engine, folder=tmp_path, urls=tuple(servers.urls), transport=transport, end=(3,)
    )
    layout = ParallelConfig(tensor=2)
    architecture = read_architecture(MODEL)
    for answer in run_ranks(gaps, 2, MODEL, architecture, layout, attach, timeout=600):
        assert answer["versions"] == [0, 1]
        assert max(answer["gaps"]) < TOLERANCE
        assert answer["moved"] > 0.01  # the second round's log-probs are those of other weights


def test_a_run_trains_on_the_servers_with_logprobs_that_are_its_own(
    servers: SglangEngine, rows: Path, tmp_path: Path
) -> None:
    train = written(tmp_path, held_out=False)
    words = [
        "train", str(QUICKSTART / "config.yaml"), f"run.dir={tmp_path / 'run'}", "run.steps=2",
        f"data.train={train}", f"data.held_out={rows}", "evaluation.prompts=4",
        "evaluation.greedy=false", "parallel.pipeline=1", "parallel.tensor=2",
        "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "rollout.engine=sglang",
        "credit.equal_groups=keep",
        f"rollout.sglang.urls=[{', '.join(servers.urls)}]", "telemetry.tensorboard=false",
    ]  # fmt: skip
    for ended in run_ranks(run_verb, 2, words, timeout=600):
        assert ended.code == 0, ended.err
    metrics = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    name = "policy/rollout_gap_max"
    gaps_of_steps = [row[name] for row in metrics if name in row]
    assert len(gaps_of_steps) == 2
    assert max(gaps_of_steps) < TOLERANCE
    assert sum("eval/sampled_success" in row for row in metrics) == 2


def test_turns_that_an_update_interrupts_go_on_under_the_new_version(
    servers: SglangEngine, model: Any, tmp_path: Path
) -> None:
    """The first of nine episodes to end loads new weights while the others decode."""
    other = moved(model, 1.02)
    engine = make_engine(MODEL, None, folder=tmp_path, urls=tuple(servers.urls))
    try:
        engine.load_parameters(model.named_parameters(), 1)
        requests = [*asked(8, 300), *asked(1, 40)]
        done: dict[int, Completion] = {}

        def follow(index: int, completion: Completion) -> Request | None:
            done[index] = completion
            if index == 8:
                engine.load_parameters(other.named_parameters(), 2)
            return None

        engine.play(requests, Sampling(), follow)
    finally:
        engine.close()
    assert sorted(done) == list(range(9))
    for index in range(8):
        request, completion = requests[index], done[index]
        versions = completion.version_T
        assert (len(versions), completion.finished) == (300, False)
        assert (versions[0], versions[-1]) == (1, 2)
        assert (np.diff(versions) >= 0).all()
        whole = np.concatenate([request.ids_T, completion.ids_T])
        old, new = (scores(m, whole)[len(request.ids_T) - 1 :] for m in (model, other))
        want = np.where(versions == 1, old, new)
        np.testing.assert_allclose(completion.logprobs_T, want, atol=TOLERANCE)
        assert np.abs(old - new).max() > 100 * TOLERANCE


def test_turns_that_are_cut_short_because_there_is_enough_go_on_later(
    servers: SglangEngine, model: Any
) -> None:
    """The shortest of nine episodes ends the first play; the second begins where it stopped."""
    servers.load_parameters(model.named_parameters(), 7)
    requests = [*asked(8, 300), *asked(1, 20)]
    done: dict[int, Completion] = {}
    servers.play(requests, Sampling(), done.__setitem__, lambda: 8 in done)
    assert sorted(done) == list(range(9))
    assert not done[8].aborted
    assert sum(len(done[i].ids_T) for i in range(8)) > 8
    other = moved(model, 1.02)
    servers.load_parameters(other.named_parameters(), 8)
    cut = [index for index in range(8) if done[index].aborted]
    assert cut
    assert all(done[index].finished for index in range(8) if index not in cut)
    for index in cut:
        begun, request = done[index], requests[index]
        assert len(begun.ids_T) < 300
        ids_T = np.concatenate([request.ids_T, begun.ids_T])
        (rest,) = servers.generate([Request(ids_T, 300 - len(begun.ids_T), 0)], Sampling())
        whole = begun.then(rest)
        assert len(whole.ids_T) == 300 or whole.finished
        ids_T = np.concatenate([request.ids_T, whole.ids_T])
        old, new = (scores(m, ids_T)[len(request.ids_T) - 1 :] for m in (model, other))
        want = np.where(np.arange(len(whole.ids_T)) < len(begun.ids_T), old, new)
        np.testing.assert_allclose(whole.logprobs_T, want, atol=TOLERANCE)
        assert set(begun.version_T) <= {7}
        assert set(rest.version_T) == {8}


def test_servers_that_gave_their_memory_back_serve_the_weights_that_come_next(
    servers: SglangEngine, model: Any
) -> None:
    requests, losses = asked(4, 8), servers.losses
    servers.load_parameters(moved(model, 1.02).named_parameters(), 10)
    servers.generate(requests, Sampling())
    servers.rest()
    with pytest.raises(RuntimeError, match="load parameters first"):
        servers.generate(requests, Sampling())
    servers.load_parameters(model.named_parameters(), 11)
    for request, done in zip(requests, servers.generate(requests, Sampling()), strict=True):
        assert_scored(model, request, done)
        assert set(done.version_T) == {11}
    assert servers.losses == losses


def test_requests_go_through_a_router_and_control_to_each_server(
    servers: SglangEngine, model: Any, tmp_path: Path
) -> None:
    """Both servers answer through it, take new weights in mid-turn and abort what is enough."""
    urls = tuple(servers.urls)
    engine = make_engine(MODEL, None, folder=tmp_path, urls=urls, router="start", end=(3,))
    other, requests = moved(model, 1.02), [*asked(8, 200), *asked(1, 30)]
    done: dict[int, Completion] = {}

    def follow(index: int, completion: Completion) -> Request | None:
        done[index] = completion
        if index == 8:
            engine.load_parameters(other.named_parameters(), 13)
        return None

    try:
        engine.load_parameters(model.named_parameters(), 12)
        engine.play(requests, Sampling(), follow)
        for index, completion in done.items():
            versions = completion.version_T
            assert set(versions) <= {12, 13}
            whole = np.concatenate([requests[index].ids_T, completion.ids_T])
            old, new = (scores(m, whole)[len(requests[index].ids_T) - 1 :] for m in (model, other))
            want = np.where(versions == 12, old, new)
            np.testing.assert_allclose(completion.logprobs_T, want, atol=TOLERANCE)
        assert 13 in {version for c in done.values() for version in c.version_T}
        cut: dict[int, Completion] = {}
        engine.play(asked(9, 300), Sampling(), cut.__setitem__, lambda: len(cut) > 0)
        assert any(completion.aborted for completion in cut.values())
    finally:
        engine.close()


def test_what_would_end_a_server_is_refused_and_the_servers_live_on(
    servers: SglangEngine, model: Any
) -> None:
    servers.load_parameters(model.named_parameters(), 4)
    losses = servers.losses
    for request, message in (
        (Request(np.array([5, 600], np.int32), 4, 0), "token id 600 is not among"),
        (Request(np.full(600, 5, np.int32), 4, 0), "600 tokens and up to 4 new ones"),
    ):
        with pytest.raises(ConfigError, match=message):
            servers.generate([request], Sampling())
    with pytest.raises(ValueError, match=r"by its config\.json, not \(3,\)"):
        servers.load_parameters([("model.norm.weight", torch.ones(3))], 5)
    servers.load_parameters(model.named_parameters(), 5)
    requests = asked(4, 8)
    for request, done in zip(requests, servers.generate(requests, Sampling()), strict=True):
        assert_scored(model, request, done)
        assert set(done.version_T) == {5}
    assert servers.losses == losses


def test_a_server_that_is_killed_in_mid_rollout_costs_no_episode_and_comes_back(
    servers: SglangEngine, model: Any
) -> None:
    other = moved(model, 1.01)
    servers.load_parameters(other.named_parameters(), 6)
    victim, pid, losses = servers.urls[0], servers.pids[0], servers.losses
    requests = asked(24, 60)
    lock, turns = threading.Lock(), list[tuple[int, Request, Completion]]()

    def follow(index: int, done: Completion) -> Request | None:
        with lock:
            turns.append((index, now[index], done))
            if len(turns) == 6:
                os.kill(pid, signal.SIGKILL)
            if sum(i == index for i, _, _ in turns) == 2:
                return None
        now[index] = Request(np.concatenate([now[index].ids_T, done.ids_T]), 60, 99)
        return now[index]

    now = dict(enumerate(requests))
    servers.play(requests, Sampling(), follow)
    # None lost, none twice: every episode has its two turns, the second going on from the first.
    assert sorted(i for i, _, _ in turns) == sorted([*range(24), *range(24)])
    for _, request, done in turns:
        assert len(done.ids_T) == 60 or done.finished
        assert_scored(other, request, done)
        assert set(done.version_T) == {6}
    servers.settle()
    assert servers.losses == losses + 1
    assert servers.urls[0] != victim
    before = servers.answered
    for request, done in zip(requests, servers.generate(requests, Sampling()), strict=True):
        assert_scored(other, request, done)  # also by the server that was started anew
        assert set(done.version_T) == {6}
    assert all(now > then for now, then in zip(servers.answered, before, strict=True))


def test_a_server_that_is_killed_in_a_weight_push_comes_back_with_the_new_weights(
    servers: SglangEngine, model: Any
) -> None:
    """One of two dies between the first buckets; the load ends with both holding all of it."""
    other = moved(model, 0.99)
    servers.load_parameters(model.named_parameters(), 7)
    victim, pid, losses = servers.urls[1], servers.pids[1], servers.losses

    def parameters() -> Any:
        for number, pair in enumerate(other.named_parameters()):
            if number == 20:
                os.kill(pid, signal.SIGKILL)
            yield pair

    servers.load_parameters(parameters(), 8)
    assert servers.version == 8
    assert servers.losses == losses + 1
    assert servers.urls[1] != victim
    assert servers.checksums()[0] == servers.checksums()[1]
    before, requests = servers.answered, asked(12, 8)
    for request, done in zip(requests, servers.generate(requests, Sampling()), strict=True):
        assert_scored(other, request, done)
        assert set(done.version_T) == {8}
    assert all(now > then for now, then in zip(servers.answered, before, strict=True))
