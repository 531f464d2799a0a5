"""The recipe: backbone with aggregated stratum gradients, plugin heads, evaluation by stratum."""

from __future__ import annotations

import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import pinet_fast
from pinet_fast.aggregation import GradientAggregator
from pinet_fast.data import RaggedLoader, evaluation_batches
from pinet_fast.errors import CheckpointError, ConfigError, TrainingInterrupted
from pinet_fast.heads import make_heads
from pinet_fast.models import PINet
from pinet_fast.training.batches import frozen_negatives_of, negatives_of, sampler_of
from pinet_fast.training.building import backbone_of
from pinet_fast.training.checkpoint import load_checkpoint, save_checkpoint, seed_everything
from pinet_fast.training.config import CANDIDATE_MODELS, RunConfig
from pinet_fast.training.evaluate import Ranking, rank_targets
from pinet_fast.training.inputs import Inputs, load_inputs
from pinet_fast.training.interrupt import StopRequest
from pinet_fast.training.observer import Observer
from pinet_fast.training.records import data_facts, step_record, strata_facts
from pinet_fast.training.results import Results
from pinet_fast.training.run_folder import RunFolder, RunLog
from pinet_fast.training.stages import HeadStage, Stage, epoch_scores, watched_stratum
from pinet_fast.training.tensorboard import TensorBoardLog, summary_writer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pinet_fast.data import EvaluationBatch
    from pinet_fast.data.splits import Part

_PARTS: tuple[Part, ...] = ("valid", "test")
_EVALUATION_USERS = 512  # a block of scores is [users, V + 1]: 25 MB at V = 12,000
_EVALUATION_PAIRS = 4096  # users times candidates, where each looks back on the history itself


def train(
    config: RunConfig | None,
    out: str | Path,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Train, evaluate, and leave a run folder.

    Args:
        config: The options; None with ``resume``, which takes those of the folder.
        out: The run folder.
        resume: Go on from the folder's checkpoint; the outcome is bit for bit that of a run that
            was never interrupted.
        observer: Told of the progress.
        tensorboard: Whether events for TensorBoard go into the folder's ``tensorboard``.

    Returns:
        The content of metrics.json.

    Raises:
        InputError: Anything wrong with options, log or folder; nothing half-written is left.
        TrainingInterrupted: Ctrl-C or SIGTERM; the checkpoint is written.
    """
    observer = observer or Observer()
    events = None
    if tensorboard:
        summary_writer()  # before anything is made
        events = TensorBoardLog
    with RunFolder(Path(out)) as folder:
        if resume:
            folder.claim()
            config = RunConfig.load(folder.config)
            state = load_checkpoint(folder.checkpoint)
            recipe = Recipe(config, load_inputs(config, observer), folder, observer)
            recipe.restore(state)
            return recipe.run(events)
        if config is None:
            raise ConfigError("train: a config is needed unless resume=True")
        with folder.creating():
            recipe = Recipe(config, load_inputs(config, observer), folder, observer)
            folder.write_config(config)
            recipe.save(log_bytes=0)
        return recipe.run(events)


class Recipe:
    """One run in progress.

    Args:
        config: The options.
        inputs: The log.
        folder: Where results go.
        observer: Told of the progress.
    """

    def __init__(
        self, config: RunConfig, inputs: Inputs, folder: RunFolder, observer: Observer
    ) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        seed_everything(config.seed)
        self.config = config
        self.inputs = inputs
        self.folder = folder
        self.observer = observer
        self.backbone: Any = backbone_of(config, inputs.store)  # a Backbone and a Module
        self.stage1 = Stage(
            "backbone",
            module=self.backbone,
            trained=self.backbone,
            optimizer=GradientAggregator(
                # Fused: a third of the time of the plain one, a tenth of a step on short sequences.
                torch.optim.Adam(self.backbone.named_parameters(), lr=config.lr, fused=True),
                config.make_rule(),
                check=config.check,  # type: ignore[arg-type] # checked by RunConfig
            ),
            loader=self._loader(config.seed),
            epochs=config.epochs,
            patience=config.patience,
            is_weighted=config.weights == "population",
            watched=watched_stratum(config, inputs.strata),
        )
        self.pinet: PINet | None = None
        self.stage2: HeadStage | None = None
        self._log_bytes = 0

    def _loader(self, seed: int) -> RaggedLoader:
        config, inputs = self.config, self.inputs
        return RaggedLoader(
            inputs.store,
            sampler_of(config, inputs.strata, seed),
            split=inputs.split,
            strata=inputs.strata,
            max_len=config.max_len,
            targets=config.targets,  # type: ignore[arg-type] # checked by RunConfig
            crop="tail" if config.targets == "next" else "prefix",
            negatives=negatives_of(config),
            seed=seed,
        )

    def _begin_heads(self) -> HeadStage:
        """Freeze the backbone and put untrained heads on it."""
        config = self.config
        heads = make_heads(config.head, self.inputs.strata.num_strata, self.backbone.state_dim)
        self.pinet = PINet(self.backbone, heads, self.inputs.strata.edges)
        # Constant weights: each head gets gradient from its own stratum alone, so any would do.
        optimizer = GradientAggregator(
            torch.optim.Adam(heads.named_parameters(), lr=config.head_lr, fused=True), "backdoor"
        )
        self.stage2 = HeadStage(
            self.pinet,
            optimizer=optimizer,
            loader=self._loader(config.seed + 1),
            epochs=config.head_epochs,
            is_weighted=config.weights == "population",
        )
        return self.stage2

    # State --------------------------------------------------------------------------------------

    def save(self, log_bytes: int | None = None) -> None:
        """Write the checkpoint."""
        if log_bytes is not None:
            self._log_bytes = log_bytes
        state = {
            "config": self.config.to_dict(),
            "fingerprint": self.inputs.store.fingerprint,
            "strata": {"spec": self.inputs.strata.spec, "edges": list(self.inputs.strata.edges)},
            "log_bytes": self._log_bytes,
            "backbone": self.stage1.state_dict(),
            "heads": self.stage2.state_dict() if self.stage2 else None,
        }
        save_checkpoint(self.folder.checkpoint, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's state.

        Raises:
            CheckpointError: The log is not the one that the run was started with.
        """
        if state["fingerprint"] != self.inputs.store.fingerprint:
            raise CheckpointError(
                f"{self.folder.checkpoint}: was made from another content of {self.config.data} "
                f"(fingerprint {state['fingerprint'][:12]}, now "
                f"{self.inputs.store.fingerprint[:12]}); restore that log, or start a new run"
            )
        self.stage1.load_state_dict(state["backbone"])
        if state["heads"] is not None:
            self._begin_heads().load_state_dict(state["heads"])
        self._log_bytes = state["log_bytes"]
        torch.set_rng_state(state["rng"])

    # Training -----------------------------------------------------------------------------------

    def run(self, events: type[TensorBoardLog] | None = None) -> dict[str, Any]:
        """Run what is left of both stages, evaluate, and write the results.

        Args:
            events: Where records go besides log.jsonl.
        """
        also = None if events is None else events(self.folder.events)
        with StopRequest() as stop, RunLog(self.folder.log, self._log_bytes, also) as log:
            stage2 = self.stage2
            if stage2 is None:
                self._run_stage(self.stage1, log, stop)
                self.stage1.restore_best()
                if self.config.heads:
                    stage2 = self._begin_heads()
                    stage2.judge(self._rank("valid"))  # untrained heads are epoch 0
                    self.save(log.size())
            if stage2 is not None:
                self._run_stage(stage2, log, stop)
                stage2.restore_best()
        return self._finish()

    def _run_stage(self, stage: Stage, log: RunLog, stop: StopRequest) -> None:
        if stage.is_finished():
            return
        steps = len(stage.loader)
        self.observer.stage_started(
            stage.name, epochs=stage.epochs, steps_per_epoch=steps, step=stage.step
        )
        while not stage.is_finished():
            self._run_epoch(stage, log, stop)
        self.observer.stage_ended(stage.name)

    def _run_epoch(self, stage: Stage, log: RunLog, stop: StopRequest) -> None:
        for batch in stage.loader:
            started = time.perf_counter()
            loss = stage.train_step(batch)
            stage.seconds += time.perf_counter() - started
            self.observer.step_done(loss)
            if stage.step % self.config.log_every == 1 % self.config.log_every:
                log.write(step_record(stage, loss))
            # After the last batch the epoch's evaluation comes first: a checkpoint always lies
            # either inside an epoch or behind its evaluation.
            if stop.requested and stage.loader.state_dict()["step"] > 0:
                self.save(log.size())
                raise self._interrupted(stage)
        self._end_epoch(stage, log)
        if stop.requested:
            raise self._interrupted(stage)

    def _interrupted(self, stage: Stage) -> TrainingInterrupted:
        return TrainingInterrupted(
            f"stopped after step {stage.step} of the {stage.name}; continue with: "
            f"pinet-fast train --out {self.folder.path} --resume"
        )

    def _end_epoch(self, stage: Stage, log: RunLog) -> None:
        stage.epoch += 1
        last = stage.epoch >= stage.epochs
        valid = None
        if last or stage.epoch % self.config.eval_every == 0:
            ranking = self._rank("valid")
            stage.judge(ranking)
            num_strata = self.inputs.strata.num_strata
            valid = epoch_scores(ranking, num_strata, use_heads=stage is self.stage2)
        record = {
            "event": "epoch",
            "stage": stage.name,
            "epoch": stage.epoch,
            "step": stage.step,
            "train_loss": stage.loss_sum / max(stage.loss_events, 1),
            "seconds": stage.seconds,
            "valid": valid,
        }
        stage.loss_sum, stage.loss_events = 0.0, 0
        log.write(record)
        self.save(log.size())
        self.observer.epoch_done(record)

    def _rank(self, part: Part) -> Ranking:
        inputs = self.inputs
        users = len(inputs.split.holdout(inputs.store, part)[0])
        self.observer.evaluation_started(part, users)
        self.backbone.eval()
        ranking = rank_targets(
            self.backbone, self.pinet, self._blocks(part), self.observer.evaluation_advanced
        )
        self.observer.evaluation_ended()
        return ranking

    def _blocks(self, part: Part) -> Iterator[EvaluationBatch]:
        config, inputs = self.config, self.inputs
        users = _EVALUATION_USERS
        if config.model in CANDIDATE_MODELS:
            users = max(_EVALUATION_PAIRS // (config.eval_negatives + 1), 1)
        return evaluation_batches(
            inputs.store,
            split=inputs.split,
            strata=inputs.strata,
            part=part,
            max_len=config.max_len,
            batch_size=users,
            negatives=frozen_negatives_of(config, inputs, part),
        )

    # Results ------------------------------------------------------------------------------------

    def results(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Rank held-out parts with what the stages have kept.

        Returns:
            The parts of metrics.json that hold metrics, with the options they depend on.
        """
        for stage in (self.stage1, self.stage2):
            if stage is not None:
                stage.restore_best()
        found = Results(self.inputs, {part: self._rank(part) for part in parts})
        return {**self._about(), **found.metrics(), **self._baselines(found)}

    def _about(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "data": data_facts(self.inputs.store),
            "strata": strata_facts(self.inputs.strata),
            "final": "backbone" if self.stage2 is None else "heads",
        }

    def _baselines(self, found: Results) -> dict[str, Any]:
        return {"baselines": found.baselines(self._blocks("test"))}

    def _finish(self) -> dict[str, Any]:
        results = Results(self.inputs, {part: self._rank(part) for part in _PARTS})
        metrics = {
            "schema": 1,
            "name": self.folder.path.resolve().name,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            **self._about(),
            "stages": {
                "backbone": self._stage_facts(self.stage1),
                "heads": None if self.stage2 is None else self._stage_facts(self.stage2),
            },
            **results.metrics(),
            **self._baselines(results),
            "coverage": str(self.stage1.optimizer.coverage()).splitlines(),
            "versions": {
                "pinet_fast": pinet_fast.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        self.folder.write_ranks(**results.ranks())
        self.folder.write_metrics(metrics)
        return metrics

    def _stage_facts(self, stage: Stage) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "epochs": stage.epoch,
            "seconds": stage.seconds,
            "events_per_second": stage.events / stage.seconds if stage.seconds else None,
        }
        if stage is self.stage1:
            facts["best_epoch"] = stage.best_epochs[0]
        else:
            facts["best_epochs"] = stage.best_epochs
        return facts
