"""HTTP to an OpenAI-compatible endpoint: one route to chat, one that lists models.

- Every request has a deadline. It is repeated only where the server has certainly not begun with
  it: no connection, 429 or 503. What breaks off on its way is lost: a reply may have been drawn.
- The API key comes from an environment variable, is sent to the configured address alone
  (redirects are not followed), and stands in no message.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from rest_mega import launch
from rest_mega.config import ConfigError, EndpointConfig

MOST_BYTES = 1 << 24
"""Of an answer; a longer one is lost."""
LONGEST_PAUSE_S = 30.0
_NOT_BEGUN = (429, 503)
_REFUSED = (401, 403, 404, 405)
"""Statuses that no other request would meet otherwise."""


class EndpointLost(Exception):
    """A request that has no usable answer; its sample is not done."""


class ContextExceeded(Exception):
    """The server says that the conversation is longer than the model's context."""


class ChatClient:
    """One endpoint's routes."""

    def __init__(self, config: EndpointConfig, session: aiohttp.ClientSession) -> None:
        self._config, self._session = config, session
        self._url = config.url.rstrip("/")
        self._key = launch.variable(config.key_variable)

    async def models(self) -> list[str]:
        """Names of what it serves."""
        found = await self._json("GET", "/models", None)
        listed = found.get("data")
        return [str(one["id"]) for one in listed or () if isinstance(one, dict) and "id" in one]

    async def chat(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """(message, finish reason) of the first choice of /chat/completions.

        Raises ContextExceeded, EndpointLost, and ConfigError where no request can do better.
        """
        found = await self._json("POST", "/chat/completions", body)
        try:
            choice = found["choices"][0]
            return dict(choice["message"]), str(choice.get("finish_reason"))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EndpointLost(f"not an answer of /chat/completions ({error!r})") from error

    async def _json(self, method: str, route: str, body: Any) -> dict[str, Any]:
        for attempt in range(self._config.retries + 1):
            status, raw, pause = await self._once(method, route, body)
            if status == 200:
                return _object(raw)
            if status not in (0, *_NOT_BEGUN):
                self._refuse(status, self._shown(raw))
            if attempt < self._config.retries:
                await asyncio.sleep(min(pause or 2.0**attempt, LONGEST_PAUSE_S))
        raise EndpointLost(f"{self._url}{route}: {self._shown(raw)} ({attempt + 1} tries)")

    async def _once(self, method: str, route: str, body: Any) -> tuple[int, bytes, float]:
        """(status, body, seconds that the server wants us to wait); status 0 where there was no
        connection."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        timeout = aiohttp.ClientTimeout(total=self._config.request_timeout_s)
        try:
            async with self._session.request(
                method,
                self._url + route,
                data=None if body is None else json.dumps(body),
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as answer:
                raw = bytearray()
                async for chunk in answer.content.iter_chunked(1 << 16):
                    raw += chunk
                    if len(raw) > MOST_BYTES:
                        raise EndpointLost(f"{self._url}{route}: more than {MOST_BYTES} bytes")
                return answer.status, bytes(raw), _seconds(answer.headers.get("Retry-After"))
        except aiohttp.ClientConnectorError as error:
            return 0, f"no connection: {error}".encode(), 0.0
        except TimeoutError as error:
            seconds = self._config.request_timeout_s
            raise EndpointLost(f"{self._url}{route}: no answer within {seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EndpointLost(f"{self._url}{route}: {type(error).__name__}: {error}") from error

    def _refuse(self, status: int, text: str) -> None:
        if status in _REFUSED or 300 <= status < 400:
            raise ConfigError(
                f"{self._url} answered {status}: {text}; check evaluation.endpoint.url, "
                f"evaluation.endpoint.model and the key in {self._config.key_variable}"
            )
        lower = text.lower()
        if status in (400, 413, 422) and "context" in lower and "length" in lower:
            raise ContextExceeded(text)
        raise EndpointLost(f"{self._url} answered {status}: {text}")

    def _shown(self, raw: bytes) -> str:
        """A server's complaint, without the key that it may quote."""
        text = raw.decode("utf-8", "replace").strip()[:500]
        return text.replace(self._key, "(key)") if self._key else text


def _object(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)  # not orjson, which refuses what models write: half surrogates
    except (ValueError, RecursionError) as error:
        raise EndpointLost(f"an answer that is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise EndpointLost("an answer that is no JSON object")
    return found


def _seconds(header: str | None) -> float:
    """Of Retry-After; a date there is not read."""
    try:
        return max(0.0, float(header)) if header else 0.0
    except ValueError:
        return 0.0


def served_name(config: EndpointConfig, served: Sequence[str]) -> str:
    """The model's name: the configured one, or the only one served; ConfigError where there are
    several or none."""
    if config.model:
        return config.model
    if len(served) != 1:
        names = ", ".join(served[:10]) or "none"
        raise ConfigError(
            f"{config.url} serves {len(served)} models ({names}): name one, --model NAME"
        )
    return served[0]
