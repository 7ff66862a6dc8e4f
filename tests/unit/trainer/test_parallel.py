"""Where ranks meet."""

from __future__ import annotations

import pytest

from rest_mega.config import ConfigError
from rest_mega.trainer import parallel


def test_ranks_that_are_started_anew_do_not_meet_in_the_store_of_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        parallel.meet(1.0)
