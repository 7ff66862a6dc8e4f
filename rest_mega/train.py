"""THE loop: prompts -> trajectories -> rewards -> samples -> scores -> weights -> step ->
publish."""

from __future__ import annotations

from typing import Any

from rest_mega.assemble import open_session, read_inputs
from rest_mega.config import RunConfig
from rest_mega.credit import weights as credit
from rest_mega.credit.advantages import token_rule
from rest_mega.credit.assign import assign
from rest_mega.credit.entropy import EntropyTracker
from rest_mega.data.prompts import PromptStream
from rest_mega.dialects import Region
from rest_mega.records import Prompt, Sample
from rest_mega.rollout.engine import Sampling
from rest_mega.session import Inputs, Session
from rest_mega.step_metrics import RolloutView, credit_metrics, rollout_metrics, step_metrics
from rest_mega.trainer.exchange import share_samples


def read(config: RunConfig) -> Inputs:
    """Everything that the run reads, checked before the ranks meet."""
    credit.settle(config.credit)
    return read_inputs(config, "train")


def run(config: RunConfig, inputs: Inputs) -> int:
    """Train with ResT until `run.steps`, from the newest checkpoint of the run directory; returns
    the exit code."""
    total = config.run.steps * config.loss.optimizer_steps
    with open_session(config, inputs, "train", total_steps=total, rollouts=True) as session:
        return Loop(session).run()


class Loop:
    """The state that a step hands to the next: prompt cursor, region entropies, step."""

    def __init__(self, session: Session) -> None:
        config, resumed = session.config, session.resumed
        self.s, self.config, self.place = session, config, session.place
        self.stream = PromptStream(session.inputs.train, config.run.seed)
        self.entropy = EntropyTracker(config.credit.entropy_momentum)
        self.step = int(resumed.get("step", 0))
        if resumed:
            self.stream.load(resumed["prompts"])
            self.entropy.load(resumed["entropy"])

    def run(self) -> int:
        """Steps with publication, evaluation and checkpoints between them."""
        s = self.s
        s.announce(self.step)
        s.publish(self.step)
        if not s.evaluate(self.step, first=True):
            return s.interrupt(self.step, **self._state())
        while self.step < self.config.run.steps:
            if not self._train_step():
                return s.interrupt(self.step, **self._state())
            s.publish(self.step)
            if not s.evaluate(self.step, first=True):
                return s.interrupt(self.step, **self._state())
            s.save_where_due(self.step, **self._state())
        return s.finish()

    def _state(self) -> dict[str, Any]:
        return {"prompts": self.stream.state(), "entropy": self.entropy.state()}

    def _train_step(self) -> bool:
        """One rollout batch and its optimizer steps; False when a stop was asked for, the step then
        not begun."""
        s, config, step = self.s, self.config, self.step + 1
        cursor = self.stream.state()
        with s.phase("rollout"):
            mine, view = self._rollout(step, self._my_prompts())
            samples = share_samples(self.place, mine)
            if self.place.sum_one(samples is None or s.stop()) > 0:
                self.stream.load(cursor)
                return False
        assert samples is not None
        with s.phase("score"):
            parts = s.trainer.pack(samples, config.loss.optimizer_steps)
            scores = s.trainer.score(parts)
            scored = s.trainer.rows.region_sums(parts, scores, len(Region))
            self.entropy.update(*scored)
        progress, running_K = step / config.run.steps, self.entropy.means_K
        raw_K = credit.region_weights(config.credit, running_K, progress=progress, step=step)
        weights = [
            [credit.normalise(raw_K, b.regions_T, b.mask_T, b.sample_T) for b in part]
            for part in parts
        ]
        rule = token_rule(config.credit, step)
        parts = s.trainer.rows.scale_advantages(parts, scores, weights, rule)
        with s.phase("train"):
            results = [s.trainer.step(*part) for part in zip(parts, scores, weights, strict=True)]
        seen = s.trainer.rows.region_sums(parts, scores, len(Region))
        # What only the training pass has seen (loss.scoring=false) is for the next step.
        self.entropy.update(seen[0] - scored[0], seen[1] - scored[1])
        pulls = s.trainer.rows.pull_sums(parts, weights, len(Region))
        metrics = step_metrics(results) | credit_metrics(*seen, *pulls, raw_K, running_K)
        metrics |= self.place.merge(rollout_metrics(view))
        self.step = step
        s.reporter.step(
            step, metrics, view.rows(s.inputs.tokenizer, raw_K, config.telemetry.trajectories)
        )
        return True

    def _my_prompts(self) -> list[Prompt]:
        """This replica's share of the step's prompts: whole groups, every rank draws the same
        stream."""
        prompts = self.stream.next(self.config.rollout.prompts_per_step)
        return prompts[self.place.data_rank :: self.place.data_size]

    def _rollout(self, step: int, prompts: list[Prompt]) -> tuple[list[Sample] | None, RolloutView]:
        """On a lead: play the prompts, reward them, tag and weigh them up; elsewhere nothing."""
        s, config = self.s, self.config
        view = RolloutView()
        if s.collector is None:
            return None, view
        sampling = Sampling(config.rollout.temperature, config.rollout.top_p)
        groups = s.collector.collect(
            prompts, config.rollout.samples_per_prompt, sampling, ("train", config.run.seed, step)
        )
        if groups is None:
            return None, view
        rewards_PG, parts = s.inputs.rubric(groups, step)
        kept, dropped = assign(
            groups,
            rewards_PG,
            config.credit,
            config.tokenizer.dialect,
            s.inputs.tokenizer.token_bytes,
        )
        view = RolloutView(
            groups, rewards_PG, parts, dropped, config.credit, config.tokenizer.dialect, step
        )
        return [sample for group in kept for sample in group], view
