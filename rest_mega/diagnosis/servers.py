"""SGLang: do the servers that the config names answer, can the ones it starts be started?"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys

import aiohttp

from rest_mega import launch
from rest_mega.config import RunConfig, SglangConfig
from rest_mega.diagnosis.findings import ERROR, OK, Finding
from rest_mega.rollout.sglang_client import Client, ServerLost, ServerRefused

CHECK = "SGLang"
ANSWER_S, IMPORT_S = 10.0, 120.0
_INSTALL = "pip install 'rest-mega[sglang]', or set rollout.sglang.python to an environment with it"


def look(config: RunConfig) -> list[Finding]:
    """Everything about SGLang; nothing is raised."""
    if config.rollout.engine != "sglang":
        return [Finding(OK, CHECK, f"not needed: rollout.engine={config.rollout.engine}")]
    sglang = config.rollout.sglang
    if sglang.urls:
        return [asyncio.run(_answers(url, sglang)) for url in sglang.urls]
    return [_importable(sglang)]


async def _answers(url: str, sglang: SglangConfig) -> Finding:
    async with aiohttp.ClientSession() as session:
        client = Client(url, session, ANSWER_S, ANSWER_S)
        try:
            ready = await client.ready(ANSWER_S)
            info = await client.info() if ready else None
        except (ServerLost, ServerRefused) as error:
            return Finding(ERROR, CHECK, f"{url} answers wrongly: {error}", "is it SGLang's?")
    if info is None:
        remedy = "start it, or mend rollout.sglang.urls; does a firewall or a proxy lie between?"
        return Finding(ERROR, CHECK, f"{url} does not answer within {ANSWER_S:.0f} s", remedy)
    text = f"{url} is ready: {info.device}, TP {info.tensor_size}, prompts of "
    return Finding(OK, CHECK, f"{text}{info.longest_prompt:,} tokens at most")


def _importable(sglang: SglangConfig) -> Finding:
    python = shutil.which(sglang.python or sys.executable)
    if python is None:
        text = f"rollout.sglang.python={sglang.python} cannot be run"
        return Finding(ERROR, CHECK, text, "name the interpreter of an environment with sglang")
    code = "import sglang, sglang.launch_server; print(sglang.__version__)"
    try:
        done = subprocess.run(
            [python, "-c", code],
            env=launch.child_environment(sglang.environment),
            capture_output=True,
            text=True,
            timeout=IMPORT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        text = f"is not imported by {python} within {IMPORT_S:.0f} s"
        return Finding(ERROR, CHECK, text, "is its file system slow? copy it to a local disk")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding(ERROR, CHECK, f"cannot be imported by {python}: {last[:200]}", _INSTALL)
    return Finding(OK, CHECK, f"{done.stdout.split()[-1]} can be started by {python}")
