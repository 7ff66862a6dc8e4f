"""Settings of the whole suite: where its processes run, and how hypothesis searches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

# Times vary with the machine's load; in CI the examples are the same in every run.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    """Tests run on the CPU, whatever the machine has; `-m gpu` runs those for a GPU instead."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """What a file's runs register in this process goes with the file."""
    from rest_mega.environments import ENVIRONMENTS
    from rest_mega.rewards.rubric import RUBRIC

    tables: tuple[dict[str, Any], ...] = (ENVIRONMENTS, RUBRIC)
    before = [dict(table) for table in tables]
    yield
    for table, names in zip(tables, before, strict=True):
        table.clear()
        table.update(names)
