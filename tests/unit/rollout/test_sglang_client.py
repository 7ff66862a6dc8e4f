"""Recorded answers of a real server are read for what they are, errors among them."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from rest_mega.rollout.sglang_client import (
    Client,
    Piece,
    ServerInfo,
    ServerLost,
    ServerRefused,
    piece,
    version_number,
)
from tests.support.sglang import ReplayServer, recorded

ASK = [1, 2, 3]


def ask(
    route: str, *names: str, do: Callable[[Client], Awaitable[Any]], seconds: float = 5.0
) -> tuple[Any, list[Any]]:
    """(what `do` returned, the bodies that the server saw on `route`)."""

    async def talk(url: str) -> Any:
        async with aiohttp.ClientSession() as session:
            return await do(Client(url, session, seconds, seconds))

    with ReplayServer({route: names}) as server:
        return asyncio.run(talk(server.url)), server.bodies(route)


def test_a_stopped_turn_is_its_ids_logprobs_and_versions() -> None:
    _, answer = recorded("generate_stop_token_ids")
    logprobs = [row[0] for row in answer["meta_info"]["output_token_logprobs"]]
    sent = {"max_new_tokens": 8, "stop_token_ids": [319]}
    got, bodies = ask(
        "/generate", "generate_stop_token_ids", do=lambda c: c.generate("r", ASK, sent)
    )
    assert got == Piece([406, 506, 319], logprobs, [-1, -1, -1], "stop")
    (body,) = bodies
    assert body == {
        "rid": "r", "input_ids": ASK, "sampling_params": sent, "return_logprob": True,
    }  # fmt: skip


def test_an_aborted_turn_is_its_beginning() -> None:
    _, answer = recorded("abort_victim")
    got = piece(answer)
    assert (got.ids, got.reason) == (answer["output_ids"], "abort")
    assert len(got.logprobs) == len(got.versions) == 8


def test_every_token_has_the_version_of_its_span() -> None:
    assert piece(recorded("pause_retract_victim")[1]).versions == [6] * 4 + [7] * 4
    assert [version_number(name) for name in ("0", "12", "default", "v6", None)] == [
        0, 12, -1, -1, -1,
    ]  # fmt: skip


def test_a_version_without_spans_is_that_of_all_tokens() -> None:
    _, answer = recorded("pause_retract_victim")
    del answer["meta_info"]["weight_versions"]
    answer["meta_info"]["weight_version"] = "3"
    assert piece(answer).versions == [3] * 8


@pytest.mark.parametrize(
    ("route", "name", "do", "message"),
    [
        ("/generate", "generate_err_badparam", lambda c: c.generate("r", ASK, {}),
         r"/generate answered 400: temperature must be a non-negative finite number, got -1\."),
        ("/generate", "generate_err_unknown_param", lambda c: c.generate("r", ASK, {}),
         "answered 400: unknown field `nonsense`"),
        ("/generate", "generate_err_too_long", lambda c: c.generate("r", ASK, {}),
         r"3000 tokens.* longer than the model's context length \(2048"),
        ("/flush_cache", "flush_cache_while_paused_in_place", lambda c: c.flush(),
         "/flush_cache.* answered 400: Flush cache failed"),
        ("/begin_weight_update", "begin_weight_update_twice", lambda c: c.begin_update(),
         "already open; call end_weight_update"),
        ("/update_weights_from_tensor", "update_weights_from_tensor_no_begin",
         lambda c: c.load_tensors(["x"]), "must run between begin_weight_update"),
        ("/update_weights_from_disk", "update_weights_from_disk_missing",
         lambda c: c.load_folder("/nonexistent"), "Failed to get weights iterator"),
        ("/weights_checker", "flush_cache_while_paused_in_place", lambda c: c.checksums(), "400"),
        ("/server_info", "model_info_after_update", lambda c: c.info(), "lacks 'tp_size'"),
    ],
)  # fmt: skip
def test_a_refusal_says_which_route_and_why(
    route: str, name: str, do: Callable[[Client], Awaitable[Any]], message: str
) -> None:
    with pytest.raises(ServerRefused, match=message):
        ask(route, name, do=do)


def test_a_broken_connection_and_a_silence_are_a_lost_server() -> None:
    with pytest.raises(ServerLost, match="/generate: ServerDisconnected"):
        ask("/generate", "generate_err_oov", do=lambda c: c.generate("r", ASK, {}))
    with pytest.raises(ServerLost, match=r"/generate did not answer within 0\.2 s"):
        ask("/generate", "silence", do=lambda c: c.generate("r", ASK, {}), seconds=0.2)


def _lose_a_logprob(answer: Any) -> None:
    answer["meta_info"]["output_token_logprobs"].pop()


def _other_id(answer: Any) -> None:
    answer["meta_info"]["output_token_logprobs"][0][1] += 1


def _no_number(answer: Any) -> None:
    answer["meta_info"]["output_token_logprobs"][0][0] = float("nan")


def _short_span(answer: Any) -> None:
    answer["meta_info"]["weight_versions"][-1]["end"] -= 1


def _no_reason(answer: Any) -> None:
    answer["meta_info"]["finish_reason"] = None


def _failed_inside(answer: Any) -> None:
    answer["meta_info"]["finish_reason"] = {"type": "abort", "status_code": 500, "message": "x"}


@pytest.mark.parametrize(
    "spoil",
    [_lose_a_logprob, _other_id, _no_number, _short_span, _no_reason, _failed_inside],
)
def test_an_answer_whose_parts_do_not_fit_is_refused(spoil: Callable[[Any], None]) -> None:
    answer = copy.deepcopy(recorded("pause_retract_victim")[1])
    piece(answer)
    spoil(answer)
    with pytest.raises(ServerRefused):
        piece(answer)


def test_readiness_and_facts_are_those_of_the_server() -> None:
    assert ask("/ready", "ready", do=lambda c: c.ready())[0] is True
    assert ask("/ready", "generate_err_oov", do=lambda c: c.ready())[0] is False
    info, _ = ask("/server_info", "server_info", do=lambda c: c.info())
    assert info == ServerInfo(tensor_size=1, longest_prompt=2042, device="cpu")
    sums, bodies = ask("/weights_checker", "weights_checker_checksum", do=lambda c: c.checksums())
    assert bodies == [{"action": "checksum"}]
    assert len(sums) == 1
    assert sums[0]["model.norm.weight"] == "2f20cd03c9cd392a"
