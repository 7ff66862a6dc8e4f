"""THE loop: prompts -> trajectories -> rewards -> samples -> scores -> weights -> step ->
publish."""

from __future__ import annotations

from pathlib import Path

from rest_mega.assemble import Session, open_session, read_inputs, run_state
from rest_mega.config import RunConfig
from rest_mega.credit import weights as credit
from rest_mega.credit.assign import assign
from rest_mega.credit.entropy import EntropyTracker
from rest_mega.data.prompts import PromptStream
from rest_mega.dialects import Region
from rest_mega.evaluate import held_out
from rest_mega.records import Prompt, Sample
from rest_mega.rollout.engine import Sampling
from rest_mega.step_metrics import RolloutView, credit_metrics, rollout_metrics, step_metrics
from rest_mega.sync.export import save_hf
from rest_mega.sync.publish import publish
from rest_mega.telemetry.report import summary_line, write_report
from rest_mega.trainer import checkpoint
from rest_mega.trainer.exchange import share_samples

INTERRUPTED = 130
"""Exit code of a run that a signal ended after it saved its checkpoint."""


def run(config: RunConfig) -> int:
    """Train with ResT until `run.steps`, from the newest checkpoint of the run directory; returns
    the exit code."""
    inputs = read_inputs(config, prompts=True)
    total = config.run.steps * config.loss.optimizer_steps
    session = open_session(config, inputs, total_steps=total, rollouts=True)
    try:
        return Loop(session).run()
    finally:
        session.close()


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
        self._publish()
        if self.step == 0:
            self._evaluate()
        while self.step < self.config.run.steps:
            if not self._train_step():
                self._save()
                return INTERRUPTED
            self._publish()
            if self._due(self.config.evaluation.every) or self.step == self.config.run.steps:
                self._evaluate()
            if self._due(self.config.run.save_every) or self.step == self.config.run.steps:
                self._save()
        self._finish()
        return 0

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _train_step(self) -> bool:
        """One rollout batch and its optimizer steps; False when a stop was asked for, the step then
        not begun."""
        s, config, step = self.s, self.config, self.step + 1
        cursor = self.stream.state()
        with s.reporter.phase("rollout"):
            mine, view = self._rollout(step, self._my_prompts())
            samples = share_samples(self.place, mine)
            if self.place.sum_one(samples is None) > 0:
                self.stream.load(cursor)
                return False
        assert samples is not None
        with s.reporter.phase("score"):
            parts = s.trainer.pack(samples, config.loss.optimizer_steps)
            scores = s.trainer.score(parts)
            sums_K, counts_K = s.trainer.region_sums(parts, scores, len(Region))
            self.entropy.update(sums_K, counts_K)
        progress = step / config.run.steps
        raw_K = credit.region_weights(
            config.credit, self.entropy.means_K, progress=progress, step=step
        )
        weights = [
            [credit.normalise(raw_K, b.regions_T, b.mask_T, b.sample_T) for b in part]
            for part in parts
        ]
        with s.reporter.phase("train"):
            results = [s.trainer.step(*part) for part in zip(parts, scores, weights, strict=True)]
        metrics = step_metrics(results) | credit_metrics(
            sums_K, counts_K, raw_K, self.entropy.means_K
        )
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
        rewards_PG, parts = s.inputs.rubric(groups)
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

    def _publish(self) -> None:
        with self.s.reporter.phase("publish"):
            publish(self.s.exporter, self.s.engine, self.step)

    def _evaluate(self) -> None:
        if not self.s.inputs.held_out:
            return
        with self.s.reporter.phase("evaluate"):
            metrics = held_out(self.s)
        if metrics:
            self.s.reporter.step(self.step, metrics, [])

    def _save(self) -> None:
        state = run_state(
            self.s, prompts=self.stream.state(), entropy=self.entropy.state(), version=self.step
        )
        run = self.config.run
        with self.s.reporter.phase("save"):
            folder = checkpoint.save(
                self.s.trainer, Path(run.dir), self.step, state, run.keep_checkpoints
            )
        self.s.reporter.event("checkpoint", f"saved {folder}")

    def _finish(self) -> None:
        """Export, report, and the one line that says what came of it."""
        run_dir, model = Path(self.config.run.dir), self.config.model.path
        if self.config.run.export and self.place.data_rank == 0:
            save_hf(
                self.s.exporter,
                self.s.inputs.architecture,
                model,
                run_dir / "hf",
                write=self.place.is_head,
                tokenizer=self.config.tokenizer.path,
            )
        if self.place.is_head:
            write_report(run_dir)
            self.s.reporter.event("done", summary_line(run_dir))
