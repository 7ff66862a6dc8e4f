"""Settings of the whole suite: where its processes run, and how hypothesis searches."""

from __future__ import annotations

import os

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
