"""Steps whose loss or gradients are not finite: not applied, kept for replay, and after too many in
a row the run ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rest_mega.dump import write_dump
from rest_mega.guard import Gap
from rest_mega.records import Microbatch, StepResult
from rest_mega.rollout_step import Rollout
from rest_mega.session import Session
from rest_mega.trainer.global_rows import Scores

NONFINITE = 4
"""Exit code of a run that such steps ended."""


class NonFinite:
    """Counts them."""

    def __init__(self, session: Session) -> None:
        self._s, self._in_a_row = session, 0

    def too_many(
        self,
        step: int,
        rollout: Rollout,
        parts: Sequence[Sequence[Microbatch]],
        scores: Sequence[Sequence[Scores]],
        results: Sequence[StepResult],
    ) -> bool:
        """True when the run must end. Keeps the step's batch where one of its optimizer steps was
        not finite. Collective: all ranks have the same results."""
        bad = [r for r in results if not (math.isfinite(r.loss) and math.isfinite(r.grad_norm))]
        if not bad:
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        s, limit = self._s, self._s.config.run.max_nonfinite
        folder, _ = write_dump(s, step, rollout, parts, scores, Gap())
        s.reporter.event(
            "nonfinite",
            f"step {step}: loss {bad[0].loss:g}, gradient norm {bad[0].grad_norm:g}: "
            f"{len(bad)} of {len(results)} optimizer steps were not applied ({self._in_a_row} such "
            f"steps in a row, run.max_nonfinite={limit}); the batch is in {folder}",
        )
        return self._in_a_row > limit
