"""What the client of SGLang servers costs, and what episodes lose beside their ideal.

    python benchmarks/rollout_client.py [--requests 2000] [--episodes 512] [--turns 8]

1. The same /generate requests (1,500 ids in, 200 ids with log-probs out, 256 at a time) by our
   client (aiohttp, orjson) and by httpx with json: CPU milliseconds of this process per request,
   requests per second.
2. Multi-turn episodes with tools through engine, collector, chat template and tool runtime, all at
   once. A turn is decoded for `--decode` seconds and a tool works for `--tool` seconds in the mean;
   ideal is the episode whose own turns and calls take longest. Target: 10 % above it at most.

The server is benchmarks/simulated_sglang.py in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from safetensors.torch import load_file
from simulated_sglang import running, seconds_of

from rest_mega.config import EnvironmentConfig, RolloutConfig, SglangConfig
from rest_mega.data.chat import ChatFormat
from rest_mega.data.tokenizer import Tokenizer, load_tokenizer
from rest_mega.environments import ENVIRONMENTS, ToolEnvironment, tool
from rest_mega.records import Prompt, Trajectory
from rest_mega.rollout.collect import Collector
from rest_mega.rollout.engine import Sampling, seed_of
from rest_mega.rollout.sglang_client import Client, piece
from rest_mega.rollout.sglang_engine import SglangEngine

ROOT = Path(__file__).parents[1]
MODEL, TOKENIZER = ROOT / "examples/quickstart/warm_start", ROOT / "examples/quickstart/tokenizer"
IDS_IN, IDS_OUT, AT_A_TIME = 1500, 200, 256
PARAMETERS = {"max_new_tokens": IDS_OUT, "temperature": 1.0, "sampling_seed": 1}
SEED = "benchmark"


class Slow(ToolEnvironment):
    """Its tool takes the seconds that the task names, one after the other."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        super().__init__(task)
        self._seconds = iter(task["seconds"])

    @tool
    def look_up(self, text: str) -> str:
        """Look something up.

        Args:
            text: what
        """
        time.sleep(next(self._seconds))
        return f"nothing is known of {text}"


ENVIRONMENTS["benchmark slow"] = Slow


# ------------------------------------------------------------------ the client


async def ours(url: str, count: int) -> None:
    """Our client, `count` requests."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        client = Client(url, session, 600.0, 600.0)
        await many(count, lambda n: client.generate(str(n), list(range(IDS_IN)), PARAMETERS))


async def by_httpx(url: str, count: int) -> None:
    """The same with httpx and the standard library's json."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=600.0) as client:

        async def one(number: int) -> None:
            body = {
                "rid": str(number),
                "input_ids": list(range(IDS_IN)),
                "sampling_params": PARAMETERS,
                "return_logprob": True,
            }
            piece((await client.post(f"{url}/generate", json=body)).json())

        await many(count, one)


async def many(count: int, one: Callable[[int], Awaitable[Any]]) -> None:
    """`one(number)` for all numbers, AT_A_TIME at a time."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(worker() for _ in range(AT_A_TIME)))


def compare_clients(count: int, repeats: int, folder: Path) -> None:
    """Print both, in turns on one server, and their ratio."""
    forms = {"aiohttp + orjson (ours)": ours, "httpx + json": by_httpx}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    with running([7] * IDS_OUT, 0.0, folder) as url:
        for _ in range(repeats):
            for name, form in forms.items():
                cpu, wall = time.process_time(), time.perf_counter()
                asyncio.run(form(url, count))
                seen[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    print(f"{count} requests, {IDS_IN} ids in, {IDS_OUT} out, {AT_A_TIME} at a time")
    for name, pairs in seen.items():
        cpu, wall = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:24} {1e3 * cpu / count:6.2f} ms CPU a request {count / wall:8.0f} requests/s")
    cost = {name: statistics.median(cpu for cpu, _ in pairs) for name, pairs in seen.items()}
    ratio = cost["httpx + json"] / cost["aiohttp + orjson (ours)"]
    print(f"{'httpx over ours':24} {ratio:6.1f} x CPU")


# ------------------------------------------------------------------ episodes


def reply_ids(tokenizer: Tokenizer) -> list[int]:
    """A reply of the policy that calls the tool, with its end-of-turn token."""
    body = '{"name": "look_up", "arguments": {"text": "' + "a word " * 30 + '"}}'
    text = f"<tool_call>\n{body}\n</tool_call>"
    return [*tokenizer.encode(text), tokenizer.end_of_turn_ids[0]]


def tasks(count: int, turns: int, mean: float) -> list[Prompt]:
    """One prompt an episode, with the seconds of its tools: 0.2 to 1.8 times the mean."""
    prompts = []
    for number in range(count):
        draws = [seed_of("tool", number, turn) % 9973 / 9972 for turn in range(turns)]
        seconds = [mean * (0.2 + 1.6 * draw) for draw in draws]
        messages = ({"role": "user", "content": "Look it up. " * 60},)
        task = {"seconds": seconds}
        prompts.append(Prompt(str(number), messages, environment="benchmark slow", task=task))
    return prompts


def ideal(prompts: list[Prompt], turns: int, decode: float) -> float:
    """Seconds of the episode whose own turns and calls take longest."""

    def own(prompt: Prompt) -> float:
        seeds = [seed_of(SEED, prompt.id, 0, turn) for turn in range(turns)]
        return sum(seconds_of(seed, decode) for seed in seeds) + sum(prompt.task["seconds"])

    return max(map(own, prompts))


def play(count: int, turns: int, decode: float, tool_s: float, folder: Path) -> None:
    """Print the time of `count` episodes at once beside the ideal."""
    tokenizer = load_tokenizer(str(TOKENIZER))
    prompts = tasks(count, turns, tool_s)
    with running(reply_ids(tokenizer), decode, folder) as url:
        servers = SglangConfig(urls=(url,), in_flight=count, verify=False, keep_copy=False)
        engine = SglangEngine(
            servers,
            model_path=str(MODEL),
            dtype="fp32",
            end_of_turn_ids=tokenizer.end_of_turn_ids,
            device="cpu",
            folder=folder,
        )
        try:
            engine.load_parameters(load_file(MODEL / "model.safetensors").items(), 1)
            collector = Collector(
                engine,
                tokenizer,
                ChatFormat(tokenizer),
                "hermes",
                RolloutConfig(max_turns=turns, max_new_tokens=1024, max_tokens=65_536),
                EnvironmentConfig(parallel_episodes=count),
            )
            cpu, wall = time.process_time(), time.perf_counter()
            groups = collector.collect(prompts, 1, Sampling(), SEED)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        finally:
            engine.close()
    assert groups is not None
    check([group[0] for group in groups], turns)
    least, tokens = ideal(prompts, turns, decode), sum(len(g[0].ids_T) for g in groups)
    print(
        f"{count} episodes of {turns} turns at once: {wall:.1f} s, ideal {least:.1f} s, overhead "
        f"{100 * (wall / least - 1):.1f} %; {1e3 * cpu / (count * turns):.1f} ms CPU a turn with "
        f"its call, {tokens / count:.0f} tokens an episode"
    )


def check(trajectories: list[Trajectory], turns: int) -> None:
    """Every turn was played and every call answered by the tool."""
    for one in trajectories:
        assert len(one.turns) == turns, one.stop
        assert all(o.status == "ok" for turn in one.turns for o in turn.outcomes), one.turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--decode", type=float, default=4.0, help="mean seconds of a turn")
    parser.add_argument("--tool", type=float, default=1.0, help="mean seconds of a call")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare_clients(words.requests, words.repeats, Path(folder))
        play(words.episodes, words.turns, words.decode, words.tool, Path(folder))


if __name__ == "__main__":
    main()
