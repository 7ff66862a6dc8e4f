"""examples/algorithm: a policy loss, an advantage and a preset of one's own, alone and in a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from rest_mega.config import ConfigError, CreditConfig, LossConfig
from rest_mega.credit.advantages import METHODS, advantages
from rest_mega.credit.curriculum import CURRICULA
from rest_mega.credit.weights import PRESETS, add_preset, region_weights
from rest_mega.dialects import Region
from rest_mega.environments import load_modules
from rest_mega.losses.policy import SURROGATES, Sequences
from tests.support.runs import Run, make_run, start

pytestmark = pytest.mark.distributed

MINE = Path(__file__).parents[2] / "examples" / "algorithm" / "mine.py"


@pytest.fixture(scope="module")
def mine() -> Iterator[ModuleType]:
    """The example, registered for the tests of this file alone."""
    (module,) = load_modules([str(MINE)])
    yield module
    tables: tuple[tuple[dict, str], ...] = (
        (SURROGATES, "sapo"), (METHODS, "mad"), (PRESETS, "calls"), (CURRICULA, "calls"),
    )  # fmt: skip
    for table, name in tables:
        del table[name]
    del sys.modules[module.__name__]


def test_the_gates_derivative_is_the_papers(mine: ModuleType) -> None:
    """r sigmoid'(tau (r - 1)) 4 A, which is A where r = 1, whatever tau."""
    pairs = [(r, a) for r in (0.1, 0.8, 1.0, 1.3, 5.0) for a in (-2.0, 0.5)]
    ratio_R, advantage_R = torch.tensor(pairs, dtype=torch.float64).T.contiguous()
    logprob_R = ratio_R.log().requires_grad_()
    sequences = Sequences(torch.arange(10), torch.ones(10, dtype=torch.int64))
    zeros = torch.zeros_like(ratio_R)
    loss_R, clipped_R = SURROGATES["sapo"](logprob_R, zeros, advantage_R, LossConfig(), sequences)
    loss_R.sum().backward()
    gate_R = torch.sigmoid(torch.where(advantage_R > 0, 1.0, 1.05) * (ratio_R - 1))
    torch.testing.assert_close(logprob_R.grad, -advantage_R * ratio_R * 4 * gate_R * (1 - gate_R))
    at_one = ratio_R == 1.0
    torch.testing.assert_close(logprob_R.grad[at_one], -advantage_R[at_one])
    assert not clipped_R.any()


def test_the_advantage_is_the_deviation_in_units_of_its_mean(mine: ModuleType) -> None:
    rewards_PG = np.array([[0.0, 0.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    want = [[-1.0, -1.0, 0.0, 2.0], [0.0] * 4]
    np.testing.assert_allclose(advantages(rewards_PG, "mad"), want, atol=1e-5)


def test_the_preset_weighs_calls_twice_as_much_at_the_start(mine: ModuleType) -> None:
    config, entropy_K = CreditConfig(preset="calls"), np.ones(len(Region), np.float32)
    first = region_weights(config, entropy_K, progress=0.0, step=1)
    last = region_weights(config, entropy_K, progress=1.0, step=9)
    assert (first[Region.TOOL_NAME], first[Region.ARG_VALUE], first[Region.ANSWER]) == (2, 2, 1)
    assert set(last.tolist()) == {0.0, 1.0}  # 0: what tools wrote


def test_a_name_that_is_taken_is_refused(mine: ModuleType) -> None:
    from rest_mega.credit.advantages import advantage
    from rest_mega.losses.policy import surrogate

    with pytest.raises(ConfigError, match="'ppo' is registered already"):
        surrogate("ppo")(SURROGATES["sapo"])
    with pytest.raises(ConfigError, match=r"'reinforce\+\+' is registered already"):
        advantage("reinforce++")(METHODS["mad"])
    with pytest.raises(ConfigError, match="'rest' is registered already"):
        add_preset("rest", PRESETS["calls"], CURRICULA["calls"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny run."""
    return make_run(tmp_path_factory.mktemp("run"))


def test_a_run_trains_with_all_three(run: Run, tmp_path: Path) -> None:
    words = ["loss.policy=sapo", "credit.advantage=mad", "credit.preset=calls", "run.steps=2"]
    words += ["loss.optimizer_steps=2", "credit.equal_groups=keep", "data.held_out="]
    modules = f"environment.modules=[{run.root / 'parity.py'}, {MINE}]"
    (ended,) = start(1, "train", run.config, *words, modules, f"run.dir={tmp_path}")
    assert ended.code == 0, ended.err
    rows = run.rows(folder=tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    assert all(row["train/grad_norm"] > 0 for row in rows if "train/loss" in row)


@pytest.mark.parametrize(
    ("key", "shipped"),
    [("loss.policy", "ppo"), ("credit.advantage", "rloo"), ("credit.preset", "rest-paper")],
)
def test_a_name_that_no_module_registers_is_refused_before_the_run(
    run: Run, tmp_path: Path, key: str, shipped: str
) -> None:
    modules = f"environment.modules=[{run.root / 'parity.py'}, {MINE}]"
    (ended,) = start(1, "train", run.config, modules, f"{key}=saop", f"run.dir={tmp_path}")
    assert ended.code == 2
    assert f"{key}='saop' is not known; choose one of" in ended.err
    assert shipped in ended.err
