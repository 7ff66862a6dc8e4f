"""What one rank finds by itself: each fault is planted for real and found with its remedy."""

from __future__ import annotations

import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rest_mega.config import RunConfig
from rest_mega.diagnosis import ERROR, OK, WARNING, Finding, folder, machine, servers, software
from rest_mega.launch import free_port
from tests.support.sglang import ReplayServer

DOCS = Path(__file__).parents[3] / "docs" / "doctor.md"
Put = Callable[..., None]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """put(distribution, version, {path: text}): installed before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, version: str = "", files: dict[str, str] | None = None) -> None:
        if version:
            info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        for path, text in (files or {}).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)

    return install


def of(check: str, found: list[Finding]) -> Finding:
    """The one finding of a check."""
    (one,) = [finding for finding in found if finding.check == check]
    return one


def config(**sections: object) -> RunConfig:
    return RunConfig.from_dict(sections)


# ------------------------------------------------------------------ packages


def test_this_environment_is_right() -> None:
    found = software.look(RunConfig())
    levels = {f.check: f.level for f in found if f.check in ("packages", "megatron-core")}
    assert set(levels.values()) == {OK}
    assert f"torch {torch.__version__}" in of("versions", found).text


def test_a_package_out_of_range_is_named_with_the_command_that_mends_it(put: Put) -> None:
    put("sentencepiece", "0.0.9")
    found = of("packages", software.look(RunConfig()))
    assert found.level == ERROR
    assert "sentencepiece is 0.0.9, needed: >=0.2" in found.text
    assert found.remedy == "pip install 'sentencepiece>=0.2'"


def test_a_combination_that_nobody_tried_is_a_warning(put: Put) -> None:
    put("megatron-core", "0.18.7")
    found = of("combination", software.look(RunConfig()))
    assert found.level == WARNING
    assert "megatron-core 0.18.7 was not tested" in found.text


def test_the_apex_of_pypi_is_not_nvidias(put: Put) -> None:
    put("apex", "", {"apex/__init__.py": "", "apex/lib/__init__.py": ""})
    found = of("apex", software.look(RunConfig()))
    assert found.level == WARNING
    assert "github.com/NVIDIA/apex" in found.remedy


def test_nvidias_apex_is_known_by_its_optimizers(put: Put) -> None:
    put("apex", "", {"apex/__init__.py": "", "apex/optimizers/fused_adam.py": ""})
    found = of("apex", software.look(RunConfig()))
    assert (found.level, found.text) == (
        OK,
        "NVIDIA's is installed, without fused weight gradients",
    )


def test_transformer_engine_that_does_not_load_says_why(put: Put) -> None:
    broken = {"transformer_engine/__init__.py": "raise OSError('undefined symbol: cudnn')"}
    put("transformer-engine", "2.2", broken)
    found = of("transformer-engine", software.look(config(model={"layers": "te"})))
    assert found.level == ERROR
    assert "2.2 is installed and cannot be imported: OSError: undefined symbol" in found.text


def test_transformer_engine_asked_for_and_not_there_is_an_error() -> None:
    found = of("transformer-engine", software.look(config(model={"layers": "te"})))
    assert found.level == ERROR
    assert "model.layers=te" in found.text


def test_the_documents_show_the_tested_combinations() -> None:
    rows = [f"| {r.python} | {r.torch} | {r.mcore} | {r.where} |" for r in software.TESTED]
    assert "\n".join(rows) in DOCS.read_text()


# ------------------------------------------------------------------ the machine


def test_this_machine_is_right() -> None:
    assert {f.level for f in machine.look(RunConfig())} <= {OK, WARNING}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_asked_for_and_not_there_is_an_error() -> None:
    found = of("GPU", machine.look(config(run={"device": "cuda"})))
    assert found.level == ERROR
    assert "run.device=cuda" in found.text


@pytest.fixture
def few_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_files")
def test_a_low_limit_of_open_files_is_a_warning() -> None:
    found = of("open files", machine.look(RunConfig()))
    assert found.level == WARNING
    assert found.text.startswith("512 at most")
    assert found.remedy.startswith("ulimit -n")


def test_a_host_name_on_loopback_is_an_error_on_many_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert "host name" not in {f.check for f in machine.look(RunConfig())}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    found = of("host name", machine.look(RunConfig()))
    assert (found.level, found.remedy) == (ERROR, "GLOO_SOCKET_IFNAME=<interface>")


@pytest.mark.parametrize(
    ("variable", "value", "wrong"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", False),
        ("GLOO_SOCKET_IFNAME", "eth77", True),
        ("NCCL_SOCKET_IFNAME", "l", False),  # a prefix
        ("NCCL_SOCKET_IFNAME", "=l", True),
        ("NCCL_SOCKET_IFNAME", "^docker", False),
    ],
)
def test_interfaces_that_variables_name_are_there(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, wrong: bool
) -> None:
    monkeypatch.setenv(variable, value)
    found = [f for f in machine.look(RunConfig()) if f.check == "interface"]
    assert [f.level for f in found] == [ERROR] * wrong
    assert all(f"{variable}={value}" in f.text and "lo" in f.remedy for f in found)


def test_a_port_in_use_is_an_error() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        asked = config(rollout={"sglang": {"port": port}})
        found = of("ports", machine.look(asked))
        assert found.level == ERROR
        assert f"rollout.sglang.port={port} cannot be had" in found.text
    assert of("ports", machine.look(asked)).level == OK


# ------------------------------------------------------------------ run.dir


def test_a_folder_is_looked_at_without_a_trace(tmp_path: Path) -> None:
    found = folder.look(tmp_path / "runs" / "new", 1e6)
    assert {f.level for f in found} == {OK}
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error() -> None:
    (found,) = folder.look(Path("/proc/runs"), 0)
    assert found.level == ERROR
    assert "/proc, where /proc/runs will be made, cannot be written" in found.text


def test_too_little_room_is_an_error(tmp_path: Path) -> None:
    found = folder.look(tmp_path, 1e18)[-1]
    assert found.level == ERROR
    assert "1,000,000,000.0 GB are needed" in found.text


def test_a_folder_that_only_rank_0_has_is_an_error(tmp_path: Path) -> None:
    store = torch.distributed.HashStore()
    store.set("doctor/probe", str(tmp_path / "elsewhere" / "file"))
    found = folder.shared(tmp_path, store, rank=1, world_size=2, seconds=0.2)
    assert found.level == ERROR
    assert "all machines share" in found.remedy


def test_rank_0_removes_its_probe_when_all_have_looked(tmp_path: Path) -> None:
    store = torch.distributed.HashStore()
    store.add("doctor/looked", 1)  # rank 1 has
    assert folder.shared(tmp_path, store, rank=0, world_size=2, seconds=0.2).level == OK
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ SGLang


def sglang(**keys: object) -> RunConfig:
    return config(rollout={"engine": "sglang", "sglang": keys})


def test_the_embedded_engine_needs_no_server() -> None:
    (found,) = servers.look(RunConfig())
    assert (found.level, found.text) == (OK, "not needed: rollout.engine=embedded")


def test_a_server_that_answers_is_told_with_its_limits() -> None:
    with ReplayServer({"/ready": ["ready"], "/server_info": ["server_info"]}) as server:
        (found,) = servers.look(sglang(urls=[server.url]))
    assert found.level == OK
    assert "is ready: cpu, TP 1, prompts of" in found.text


def test_a_server_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    (found,) = servers.look(sglang(urls=[url]))
    assert found.level == ERROR
    assert found.text == f"{url} does not answer within 10 s"


def test_a_python_without_sglang_is_an_error() -> None:
    (found,) = servers.look(sglang(python="/usr/bin/python3"))
    assert found.level == ERROR
    assert "No module named 'sglang'" in found.text


def test_a_python_that_is_not_there_is_an_error() -> None:
    (found,) = servers.look(sglang(python="/nowhere/python"))
    assert found.level == ERROR
    assert "rollout.sglang.python=/nowhere/python cannot be run" in found.text
