"""A server is a child process: its words, its log in an error, and its end with its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rest_mega.config import ConfigError
from rest_mega.rollout.sglang_server import Server, default_arguments, server_words

ROOT = Path(__file__).parents[3]


def package(folder: Path, body: str) -> dict[str, str]:
    """The environment in which `python -m sglang.launch_server` runs `body`."""
    (folder / "sglang").mkdir(parents=True)
    (folder / "sglang" / "__init__.py").touch()
    (folder / "sglang" / "launch_server.py").write_text(body)
    return {"PYTHONPATH": str(folder)}


def gone(pid: int) -> bool:
    """The process has ended, or is a zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(what: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_arguments_become_words_as_sglang_spells_them() -> None:
    assert server_words(
        {"model_path": "m", "tp_size": 2, "skip_tokenizer_init": True, "disable_x": False,
         "port": None, "lora_paths": ["a", "b"], "json_model_override_args": {"a": 1}}
    ) == [
        "--model-path", "m", "--tp-size", "2", "--skip-tokenizer-init", "--lora-paths", "a", "b",
        "--json-model-override-args", '{"a": 1}',
    ]  # fmt: skip


def test_a_server_listens_on_loopback_in_the_trainers_dtype_unless_told_otherwise() -> None:
    found = default_arguments("m", "bf16", "cuda")
    assert (found["host"], found["dtype"], found["device"]) == ("127.0.0.1", "bfloat16", "cuda")
    assert "attention_backend" not in found
    assert default_arguments("m", "fp32", "cpu")["attention_backend"] == "torch_native"


def test_a_server_that_ends_before_it_is_ready_shows_the_end_of_its_log(tmp_path: Path) -> None:
    environment = package(tmp_path, "import sys; sys.exit('no such argument: ' + sys.argv[-1])")
    arguments = {"host": "127.0.0.1", "device": "cpu", "port": 1, "colour": "red"}
    server = Server("", arguments, environment, tmp_path / "logs" / "server.log")
    server.start()
    wait_for(lambda: not server.alive)
    with pytest.raises(ConfigError, match=r"(?s)ended with code 1 .*server\.log:\nno such .*red"):
        server.check()


def test_an_interpreter_that_does_not_exist_is_named_with_the_remedy(tmp_path: Path) -> None:
    server = Server("/no/python", {"host": "h", "device": "cpu"}, {}, tmp_path / "log")
    with pytest.raises(ConfigError, match=r"rollout\.sglang\.python='/no/python' cannot be run"):
        server.start()


@pytest.mark.parametrize(("ours", "want"), [(None, "3,1"), ("4,5,GPU-6,7", "7,5")])
def test_a_server_sees_the_gpus_that_it_gets_in_their_order(
    ours: str | None, want: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if ours is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ours)
    body = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)"
    arguments = {"host": "127.0.0.1", "device": "cuda", "port": 1}
    server = Server("", arguments, package(tmp_path, body), tmp_path / "log", gpus=(3, 1))
    server.start()
    wait_for(lambda: not server.alive)
    assert server.tail() == want + "\n"


def test_a_stubborn_server_and_its_children_are_ended(tmp_path: Path) -> None:
    body = (
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(os.fork(), flush=True)\ntime.sleep(600)\n"
    )
    server = Server(
        "", {"host": "h", "device": "cpu"}, package(tmp_path, body), tmp_path / "log"
    )  # fmt: skip
    server.start()
    wait_for(lambda: len(server.tail().split()) == 2)  # parent and child have printed
    child = max(map(int, server.tail().split()))
    asyncio.run(server.stop(seconds=0.2))
    assert not server.alive
    wait_for(lambda: gone(child))


def test_a_server_does_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    body = "import os, time\nprint(os.fork(), flush=True)\ntime.sleep(600)\n"
    environment = package(tmp_path, body)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from rest_mega.rollout.sglang_server import Server\n"
        f"s = Server('', {{'host': 'h', 'device': 'cpu'}}, {environment!r}, Path('log'))\n"
        "s.start(); print(s.pid, flush=True); time.sleep(600)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.stdout is not None
    pid = int(run.stdout.readline())
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and len(log.read_text().split()) == 2)
    child = max(map(int, log.read_text().split()))  # one that does not listen for its parent's end
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_for(lambda: gone(pid))
    wait_for(lambda: gone(child))


def test_a_server_is_no_rank_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from rest_mega import launch

    for name in ("RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "HOME_OF_TESTS"):
        monkeypatch.setenv(name, "7")
    found = launch.child_environment({"MORE": "1"})
    assert not {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(found)
    assert (found["HOME_OF_TESTS"], found["MORE"]) == ("7", "1")
