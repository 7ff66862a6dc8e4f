"""THE loop: prompts -> trajectories -> rewards -> samples -> scores -> weights -> step ->
publish."""

from __future__ import annotations

import functools
from typing import Any

from rest_mega import guard
from rest_mega.assemble import open_session, read_inputs
from rest_mega.config import RunConfig
from rest_mega.credit import weights as credit
from rest_mega.credit.advantages import BATCH_METHODS, METHODS, token_rule
from rest_mega.credit.assign import penalised
from rest_mega.credit.entropy import EntropyTracker
from rest_mega.data.prompts import PromptStream
from rest_mega.dialects import Region
from rest_mega.dump import end_run
from rest_mega.losses.policy import SURROGATES
from rest_mega.nonfinite import NONFINITE, NonFinite
from rest_mega.records import Floats, Microbatch
from rest_mega.rollout_step import Rollout, Rollouts
from rest_mega.session import Inputs, Session
from rest_mega.step_metrics import credit_metrics, report_rows, rollout_metrics, step_metrics
from rest_mega.trainer.exchange import gather_rewards
from rest_mega.trainer.parallel import Sums
from rest_mega.trainer.trainer import Scores


def read(config: RunConfig) -> Inputs:
    """Everything that the run reads, checked before the ranks meet."""
    inputs = read_inputs(config, "train")
    methods = (*METHODS, *BATCH_METHODS)
    config.check_names({"loss.policy": SURROGATES, "credit.advantage": methods})
    credit.settle(config.credit)
    return inputs


def run(config: RunConfig, inputs: Inputs) -> int:
    """Train with ResT until `run.steps`, from the newest checkpoint of the run directory; returns
    the exit code."""
    total = config.run.steps * config.loss.optimizer_steps
    with open_session(config, inputs, "train", total_steps=total, rollouts=True) as session:
        return Loop(session).run()


Parts = list[list[Microbatch]]
Scored = list[list[Scores]]


class Loop:
    """The state that a step hands to the next: prompt cursor, region entropies, step."""

    def __init__(self, session: Session) -> None:
        config, resumed = session.config, session.resumed
        self.s, self.config = session, config
        self.stream = PromptStream(session.inputs.train, config.run.seed)
        self.entropy = EntropyTracker(config.credit.entropy_momentum)
        self.nonfinite = NonFinite(session)
        self.step = int(resumed.get("step", 0))
        if resumed:
            self.stream.load(resumed["prompts"])
            self.entropy.load(resumed["entropy"])
        self.rollouts = Rollouts(session, self.stream, session.carried)

    def run(self) -> int:
        """Steps with publication, evaluation and checkpoints between them."""
        s = self.s
        s.announce(self.step)
        guard.announce(s)
        s.publish(self.step)
        if not s.evaluate(self.step, first=True):
            return s.interrupt(self.step, **self._state())
        while self.step < self.config.run.last_step:
            code = self._train_step()
            if code is not None:
                return code
            s.publish(self.step)
            if not s.evaluate(self.step, first=True):
                return s.interrupt(self.step, **self._state())
            s.save_where_due(self.step, **self._state())
        return s.finish()

    def _state(self) -> dict[str, Any]:
        return {
            "prompts": self.stream.state(),
            "entropy": self.entropy.state(),
            "episodes": self.rollouts.unfinished,
        }

    def _train_step(self) -> int | None:
        """One rollout batch and its optimizer steps; an exit code where the run ends instead, the
        step then not begun: a stop was asked for, or the guard found a mismatch."""
        s, config, step = self.s, self.config, self.step + 1
        with s.phase("rollout"):
            rollout = self.rollouts.play(step)
            s.rest()
        if rollout is None:
            return s.interrupt(self.step, **self._state())
        with s.phase("score"):
            parts = s.trainer.pack(rollout.samples, config.loss.optimizer_steps)
            scores = s.trainer.score(parts)
            gap, watched = guard.examine(s, step, rollout, parts, scores)
        if gap.crossed(config.guard):
            self.rollouts.discard(step)
            s.keep(self.step, **self._state())
            return end_run(s, step, rollout, parts, scores, gap)
        scored = s.trainer.rows.region_sums(parts, scores, len(Region))
        self.entropy.update(*scored)
        progress, running_K = step / config.run.steps, self.entropy.means_K
        raw_K = credit.region_weights(config.credit, running_K, progress=progress, step=step)
        weights = [
            [credit.normalise(raw_K, b.regions_T, b.mask_T, b.sample_T) for b in part]
            for part in parts
        ]
        parts, kl = self._penalise(rollout, parts, scores)
        rule = token_rule(config.credit, step)
        parts = s.trainer.rows.credit_tokens(parts, scores, weights, rule)
        with s.phase("train"):
            results = [s.trainer.step(*part) for part in zip(parts, scores, weights, strict=True)]
        seen = scored
        if not config.loss.scoring:  # only the training pass has seen entropies: for the next step
            seen = s.trainer.rows.region_sums(parts, scores, len(Region))
            self.entropy.update(*seen)
        pulls = s.trainer.rows.pull_sums(parts, weights, len(Region))
        metrics = step_metrics(results) | credit_metrics(*seen, *pulls, raw_K, running_K)
        metrics |= s.place.merge({**rollout_metrics(rollout.view), **kl}) | rollout.counts | watched
        self.step = step
        s.reporter.step(step, metrics, self._report_rows(rollout, parts, scores, raw_K))
        if self.nonfinite.too_many(step, rollout, parts, scores, results):
            s.keep(step, **self._state())
            return NONFINITE
        return None

    def _report_rows(
        self, rollout: Rollout, parts: Parts, scores: Scored, raw_K: Floats
    ) -> list[dict[str, Any]]:
        """The trajectories that the report shows, on the head: its own samples are the first of its
        replica's. Collective."""
        s, shown = self.s, self.s.config.telemetry.trajectories
        lengths = [len(sample.ids_T) for sample in rollout.samples[:shown]]
        traces = s.trainer.rows.traces(parts, scores, lengths)
        if not s.place.is_head:
            return []
        dialect = s.config.tokenizer.dialect
        return report_rows(rollout.view, s.inputs.tokenizer, dialect, raw_K, traces, shown)

    def _penalise(self, rollout: Rollout, parts: Parts, scores: Scored) -> tuple[Parts, Sums]:
        """(the parts with advantages of rewards less credit.kl_reward times KL, that KL)."""
        s, config, count = self.s, self.config.credit, len(rollout.samples)
        if not config.kl_reward:
            return parts, {}
        kl_S = s.trainer.rows.kl_of_samples(parts, scores, config.kl_reward_estimator, count)
        everywhere = functools.partial(gather_rewards, s.place)
        advantage_S = penalised(rollout.samples, config.kl_reward * kl_S, config, everywhere)
        sums = {"reward/kl": (float(kl_S.sum()), float(count))} if s.place.is_lead else {}
        return s.trainer.rows.with_advantages(parts, advantage_S), sums
