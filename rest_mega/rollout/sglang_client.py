"""HTTP to one SGLang server: a method per route, its answer checked and given a type.

What is sent to /generate and what comes back are token ids; text never travels. Written for the
routes of SGLang 0.5.23.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from rest_mega.rollout.sglang_checksums import Kind


class ServerLost(Exception):
    """The connection broke or a deadline passed: what the server did with the request is
    unknown."""


class ServerRefused(Exception):
    """The server answered that it will not; its message says why."""


@dataclass(frozen=True)
class Piece:
    """What one /generate gave: a whole turn, or its beginning where it was aborted."""

    ids: list[int]
    logprobs: list[float]
    versions: list[int]
    """Policy version of each token; -1 for weights that were never named by us."""
    reason: str
    """stop, length or abort."""


@dataclass(frozen=True)
class ServerInfo:
    """What a client must know of a server."""

    tensor_size: int
    """Tensor-parallel size: how often a payload of weights is sent along."""
    longest_prompt: int
    """Tokens of input at most."""
    device: str
    expert_size: int = 1
    """Ranks that experts are spread over whole."""

    @property
    def kind(self) -> Kind:
        """What its checksums depend on."""
        return Kind(self.device, self.tensor_size, self.expert_size)


class Client:
    """One server's routes. Every call has a deadline; none is repeated here."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, request_s: float, update_s: float
    ) -> None:
        """`request_s`: deadline of a generation; `update_s`: of everything else, in seconds."""
        self.url = url.rstrip("/")
        self._session, self._request_s, self._update_s = session, request_s, update_s

    async def ready(self, seconds: float = 5.0) -> bool:
        """True once requests will be answered."""
        for route in ("/ready", "/health"):
            try:
                status, _ = await self._call("GET", route, None, seconds)
            except ServerLost:
                return False
            if status != 404:  # older servers have /health alone
                return status == 200
        return False

    async def healthy(self, seconds: float) -> bool:
        """True when the server generates a token within `seconds`."""
        try:
            status, _ = await self._call("GET", "/health_generate", None, seconds)
        except ServerLost:
            return False
        return status == 200

    async def info(self) -> ServerInfo:
        """Sizes and limits."""
        found = await self._json("GET", "/server_info")
        try:
            return ServerInfo(
                int(found["tp_size"]),
                int(found["max_req_input_len"]),
                str(found["device"]),
                int(found.get("ep_size") or 1),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ServerRefused(f"{self.url}/server_info lacks {error}") from error

    async def generate(
        self, rid: str, ids: Sequence[int], sampling_params: Mapping[str, Any]
    ) -> Piece:
        """Continue `ids`. An aborted request is an answer like any other: what it had reached."""
        body = {
            "rid": rid,
            "input_ids": list(ids),
            "sampling_params": sampling_params,
            "return_logprob": True,
        }
        return piece(await self._json("POST", "/generate", body, self._request_s))

    async def abort(self, rid: str) -> None:
        """End a request; the server takes an unknown one without complaint."""
        await self._json("POST", "/abort_request", {"rid": rid})

    async def pause(self) -> None:
        """Stop decoding; what runs is aborted, its partial results answered."""
        await self._json("POST", "/pause_generation", {"mode": "abort"})

    async def resume(self) -> None:
        """Decode again."""
        await self._json("POST", "/continue_generation", {})

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Give the GPU memory of these back (weights, kv_cache); what was in it is lost. Only while
        nothing runs: the server would not survive it otherwise."""
        await self._json("POST", "/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Take it again; only for tags that were released."""
        await self._json("POST", "/resume_memory_occupation", {"tags": list(tags)})

    async def flush(self) -> None:
        """Forget all cached prefixes; waits until nothing runs any more."""
        seconds = max(1, int(self._update_s / 2))
        await self._json("POST", f"/flush_cache?timeout={seconds}", {})

    async def begin_update(self) -> None:
        """Open the bracket that weights from tensors and groups must be sent in."""
        await self._done("/begin_weight_update", {})

    async def end_update(self) -> None:
        """Close the bracket."""
        await self._done("/end_weight_update", {})

    async def load_tensors(self, payloads: Sequence[str]) -> None:
        """A bucket of weights as base64 text of a pickle, one per tensor rank."""
        listed = {"serialized_named_tensors": list(payloads), "load_format": "flattened_bucket"}
        body = {**listed, "flush_cache": False}
        await self._done("/update_weights_from_tensor", body)

    async def load_folder(self, folder: str) -> None:
        """Weights from a checkpoint folder that the server can read."""
        await self._done("/update_weights_from_disk", {"model_path": folder})

    async def join_group(self, group: Mapping[str, Any]) -> None:
        """Enter the process group that weights are broadcast in."""
        await self._done("/init_weights_update_group", group)

    async def leave_group(self, name: str) -> None:
        """Leave it."""
        await self._done("/destroy_weights_update_group", {"group_name": name})

    async def receive(self, listed: Mapping[str, Any]) -> None:
        """Take part in one broadcast of `names`, with `dtypes` and `shapes`, one after the
        other."""
        body = {**listed, "load_format": "flattened_bucket", "flush_cache": False}
        await self._done("/update_weights_from_distributed", body)

    async def name_version(self, version: int | None) -> None:
        """What the loaded weights are called from now on; None while they are being replaced."""
        name = "loading" if version is None else str(version)
        body = {"new_version": name, "abort_all_requests": False}
        await self._done("/update_weight_version", body)

    async def version(self) -> int:
        """The name of the loaded weights; -1 where it is none of ours."""
        return version_number((await self._json("GET", "/model_info")).get("weight_version"))

    async def checksums(self) -> list[dict[str, str]]:
        """Per tensor rank of the server: name of a parameter as the server fuses it -> checksum;
        pipeline ranks together."""
        found = await self._done("/weights_checker", {"action": "checksum"})
        sums: dict[int, dict[str, str]] = {}
        for rank in found["ranks"]:
            place = rank["parallelism_info"][0]["tp_rank"]
            sums.setdefault(place, {}).update(rank["checksums"])
        return [sums[place] for place in sorted(sums)]

    async def _done(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        found = await self._json("POST", route, body)
        if not found.get("success"):
            raise ServerRefused(f"{self.url}{route}: {found.get('message')}")
        return found

    async def _json(
        self,
        method: str,
        route: str,
        body: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> dict[str, Any]:
        status, raw = await self._call(method, route, body, seconds or self._update_s)
        if not 200 <= status < 300:
            raise self._failure(status, f"{self.url}{route} answered {status}: {complaint(raw)}")
        try:
            found = orjson.loads(raw)
        except orjson.JSONDecodeError:  # some routes answer with a sentence or nothing
            return {}
        return found if isinstance(found, dict) else {}

    def _failure(self, status: int, text: str) -> Exception:
        """What an answer with this status is."""
        return ServerRefused(text)

    async def _call(
        self, method: str, route: str, body: Mapping[str, Any] | None, seconds: float
    ) -> tuple[int, bytes]:
        """(status, body) of one exchange; ServerLost when it does not come to an end."""
        data = None if body is None else orjson.dumps(body)
        try:
            async with self._session.request(
                method,
                self.url + route,
                data=data,
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=seconds),
            ) as answer:
                return answer.status, await answer.read()
        except TimeoutError as error:
            raise ServerLost(f"{self.url}{route} did not answer within {seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLost(f"{self.url}{route}: {type(error).__name__}: {error}") from error


def piece(answer: Mapping[str, Any]) -> Piece:
    """The reply of /generate; ServerRefused when ids, log-probs and versions do not fit each other
    or the request failed inside the server."""
    try:
        meta, ids = answer["meta_info"], [int(i) for i in answer["output_ids"]]
        reason = meta["finish_reason"]
        listed = meta.get("output_token_logprobs") or []
        logprobs = [float(row[0]) for row in listed]
        if reason["type"] == "abort" and (reason.get("status_code") or 0) >= 400:
            raise ServerRefused(f"the server gave a request up: {reason.get('message')}")
        if [row[1] for row in listed] != ids or not all(map(math.isfinite, logprobs)):
            raise ServerRefused(f"{len(ids)} ids and {len(listed)} log-probs do not fit each other")
        return Piece(ids, logprobs, _versions(meta, len(ids)), str(reason["type"]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ServerRefused(f"not an answer of /generate ({error!r})") from error


def _versions(meta: Mapping[str, Any], length: int) -> list[int]:
    """The version of each token from its spans [start, end); one for all on older servers."""
    spans = meta.get("weight_versions") or [
        {"version": meta.get("weight_version"), "start": 0, "end": length}
    ]
    versions = [
        version_number(span["version"])
        for span in spans
        for _ in range(int(span["start"]), int(span["end"]))
    ]
    if len(versions) != length:
        raise ServerRefused(f"weight_versions {spans} do not cover {length} tokens")
    return versions


def version_number(name: object) -> int:
    """The version that `name_version` gave; -1 for a server's own names."""
    return int(name) if isinstance(name, str) and name.isdecimal() else -1


def complaint(raw: bytes) -> str:
    """The sentence in an error's body: {"error": {"message": ...}}, {"error": ...},
    {"message": ...}, or text."""
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw.decode("utf-8", "replace").strip()
    if isinstance(found, dict):
        error = found.get("error", found.get("message", found))
        return str(error.get("message", error) if isinstance(error, dict) else error)
    return str(found)
