"""Takes a run from its config to its last checkpoint, on each of its processes."""

import gc
import math
import os
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from infini_ds import config as configuration
from infini_ds.config import RunConfig
from infini_ds.data.curriculum import CurriculumLanes
from infini_ds.data.lanes import Plan
from infini_ds.data.windows import Windows, read_windows, total_weight
from infini_ds.errors import RunError, SharedError, UserError
from infini_ds.evaluation.held_out import HeldOut
from infini_ds.guard.signals import StopRequest
from infini_ds.guard.watchdog import Watchdog
from infini_ds.model.flops import device_peak_flops, training_flops_per_token
from infini_ds.model.layers import count_parameters
from infini_ds.model.optimizer import learning_rate_factor, write_penalty_factor
from infini_ds.model.trained import trained_counts
from infini_ds.model.write_gate import write_penalty
from infini_ds.parallel import weights_on_disk
from infini_ds.parallel.build import start_distributed
from infini_ds.parallel.engine import StepResult, StepSize
from infini_ds.parallel.ranks import is_first_rank, own_rank, together, world_size
from infini_ds.runs import failures
from infini_ds.runs.directory import REPORT, Checkpoint
from infini_ds.runs.tokenizer import keep_tokenizer
from infini_ds.system.resources import cores_at_hand, keep_freed_memory
from infini_ds.system.whole_file import whole_file
from infini_ds.training import checkpoint
from infini_ds.training.background_save import BackgroundSave
from infini_ds.training.bad_steps import BadSteps, bad_documents
from infini_ds.training.checkpoint import Saved
from infini_ds.training.kernel_check import find_fault
from infini_ds.training.monitor import Monitor
from infini_ds.training.opening import Opened, open_run
from infini_ds.training.profile import Profile
from infini_ds.training.report import report


def pretrain(config: RunConfig) -> None:
    """Trains until train.steps; resumes from the newest valid checkpoint if there is one.

    The process group stays open on return, so leave the process by os._exit.

    Raises:
        SharedError: a setting or a file is wrong.
        UserError: this rank cannot meet the others at the given address.
        RunError: the run cannot go on.
    """
    stop = StopRequest()
    _set_threads(config)
    keep_freed_memory()
    gc.freeze()  # what is imported stays: DeepSpeed has it searched for garbage eight times
    fault = find_fault(config)
    try:
        start_distributed(config.train.timeout)
        watchdog = Watchdog(config)
    except RunError as error:
        failures.record(config.output_dir, 0, str(error))
        raise
    try:
        Trainer(open_run(config, watchdog, fault), stop, watchdog).run()
        dist.barrier()
        watchdog.stop()
        if config.parallel.nvme_path:
            weights_on_disk.remove(config)
    except UserError as error:  # raised on all ranks together; an open group may abort the exit
        watchdog.stop()
        dist.destroy_process_group()
        raise SharedError(str(error)) from None
    except Exception as error:
        raise watchdog.failed(error) from None


class Trainer:
    """Trains a run on this process, from where it was opened."""

    def __init__(self, opened: Opened, stop: StopRequest, watchdog: Watchdog):
        self.config, self.data, self.lanes = opened.config, opened.data, opened.lanes
        self.engine = opened.engine
        self._lock = opened.lock  # other runs are kept out as long as this file is open
        self.stop, self.watchdog = stop, watchdog
        self.step = self.first_step = 0
        self.saved: int | None = None
        """Step of the checkpoint that matches the run's present state, if there is one."""
        self.bad_steps = BadSteps(self.config.train)
        self.tokens = 0
        self.evaluated = False
        self.sample = ""
        if opened.saved:
            self.bad_steps.rollbacks = opened.saved.state.get("rollbacks", 0)
            self._load(opened.saved)
            self.first_step = self.step
        with together():
            self.held_out = HeldOut(self.config, self.data, self.engine)
            if is_first_rank():
                kind = self.config.data.tokenizer.kind
                keep_tokenizer(self.data.tokenizer, kind, Path(self.config.output_dir))
        self.monitor, output_dir = None, Path(self.config.output_dir)
        with together():
            if is_first_rank():
                self.monitor = Monitor(self.config, self.step)
        self.background = None
        if self.config.train.async_save:
            self.background = BackgroundSave(self.engine, self.config, self._saved)
        self.profile = Profile(
            self.config.train.profile, output_dir / "profile", own_rank(), self.engine.device,
            self._say,
        )  # fmt: skip
        if is_first_rank():
            with whole_file(output_dir / "config.yaml", "output_dir", RunError) as file:
                file.write_text(configuration.dump(self.config))
            if self.step < self.config.train.steps:
                (output_dir / REPORT).unlink(missing_ok=True)  # left from a shorter run
            self._introduce(opened)

    def run(self) -> None:
        """Trains, evaluates and saves; ends at train.steps or when asked to stop."""
        config = self.config
        quality: dict[str, float] = {}
        stopping = False
        if config.train.on_bad_step == "rollback" and self.saved is None:
            self._save()  # a rollback needs a checkpoint to go back to
        if self._evaluation_is_due() and self._ended_before_evaluation():
            quality = self._evaluate()
        while self.step < config.train.steps and not stopping:
            if self.step in self.bad_steps.skip:
                self._skip_step()
            else:
                with self.profile.step(self.step + 1):
                    stopping = self._train_step()
            self.watchdog.step_done(self.step)
            if self.saved == self.step:
                continue  # the run went back to a checkpoint
            ended = self.step == config.train.steps
            # A skipped step may have left memories that are not finite.
            due = self.step % config.train.save_every == 0 and not self.engine.skipped_in_a_row
            if stopping or ended or due:
                self._save()
            if not stopping and (ended or self._evaluation_is_due()):
                quality = self._evaluate()
        self.profile.finish(self.step)
        if self.saved != self.step:
            self._save()
        self._finish_saving()
        if stopping:
            self._say(f"stopped as asked at step {self.step}; the same command goes on from there")
        elif not self.evaluated:
            quality = self._evaluate()
        if self.monitor:
            with self.watchdog.patient():  # figures may have far to go
                self.monitor.close()
            if not stopping:
                counts = self._count_bad_steps()
                report(config, self.step, counts, quality, self.sample, self.monitor.console)

    def _train_step(self) -> bool:
        """Makes one step; returns whether the run was asked to stop."""
        config = self.config
        begin = time.perf_counter()
        plan = self.lanes.next_plan()
        rate_factor = learning_rate_factor(self.step, config.train.steps, config.optimizer)
        penalty_factor = write_penalty_factor(self.step, config.optimizer)
        weight = total_weight(self.data.split("train"), plan)
        # Without any weight there is no loss, so any divisor will do.
        size = StepSize(weight or 1.0, plan.num_tokens)
        result = self.engine.train_step(
            self._reader(plan), size, rate_factor, penalty_factor, self.stop.requested
        )
        if result.fault and self._went_back(plan, result):
            return result.stop
        curriculum = {}
        if isinstance(self.lanes, CurriculumLanes) and result.answers and not result.fault:
            exact = result.right / result.answers
            self.lanes.observe(exact)
            curriculum = {
                "train/exact_match": exact,
                "train/curriculum_segments": self.lanes.level_segments,
            }
            if self.lanes.level_keys:
                curriculum["train/curriculum_keys"] = self.lanes.level_keys
        self.step += 1
        self.tokens += plan.num_tokens
        # The first step is logged too: the supervisor reads there that a step was made.
        log = self.step % config.train.log_every == 0 or self.step == self.first_step + 1
        writes = self._describe_writes(size.tokens, penalty_factor) if log else {}
        if self.monitor:
            elapsed = time.perf_counter() - begin
            metrics = self._metrics(result, size, elapsed)
            self.monitor.step(self.step, metrics | writes | curriculum, log)
        return result.stop

    def _metrics(self, result: StepResult, size: StepSize, elapsed: float) -> dict[str, float]:
        """Returns the figures of a step that took `elapsed` seconds."""
        config = self.config
        loss = result.loss_sum / size.loss_weight
        speed = size.tokens / elapsed
        metrics = {
            "train/loss": loss,
            "train/perplexity": math.exp(min(loss, 700)),
            "train/bits_per_byte": loss / math.log(2) / self.data.bytes_per_token,
            "train/gradient_norm": result.gradient_norm,
            **{f"train/{name}": count for name, count in self._count_bad_steps().items()},
            "train/tokens": self.tokens,
            **self._epochs(),
            "speed/tokens_per_second": speed,
            "speed/useful_tokens": size.tokens / self.config.step_tokens,
            "seconds/step": elapsed,
            **{f"seconds/{phase}": seconds for phase, seconds in result.seconds.items()},
            **{f"learning_rate/{name}": rate for name, rate in result.learning_rates.items()},
        }
        peak = device_peak_flops(self.engine.device, config.train.dtype)
        if peak:  # only useful tokens count as work, not padding
            flops = training_flops_per_token(config.model) * speed
            metrics["speed/model_flops_utilisation"] = flops / (peak * world_size())
        return metrics

    def _describe_writes(self, tokens: int, penalty_factor: float) -> dict[str, float]:
        """Returns how much of the last step each layer wrote, and what that added to the loss."""
        memory = self.config.model.memory
        if not memory.write_gate:
            return {}
        shares = self.engine.written()
        shares /= tokens * self.config.model.kv_heads
        penalty = penalty_factor * write_penalty(memory, float(shares[:, 0].sum()), 1)
        metrics = {"train/write_penalty": penalty}
        for layer, (mass, zeros) in enumerate(shares.tolist()):
            metrics[f"memory/write_mass/layer_{layer}"] = mass
            metrics[f"memory/write_zeros/layer_{layer}"] = zeros
        return metrics

    def _reader(self, plan: Plan):
        split, n = self.data.split("train"), self.config.model.segment_length
        last_token = self.data.tokenizer.vocab_size - 1

        def read(micro_batch: int) -> Windows:
            lanes = self.engine.lanes_of(micro_batch)
            windows = read_windows(split, plan, lanes, n)
            # Large stores are not checked for corruption when they are opened.
            corrupt = torch.maximum(windows.tokens, windows.labels).amax(dim=1) > last_token
            if corrupt.any():
                windows.tokens.clamp_(max=last_token)
                windows.labels.clamp_(max=last_token)
                return windows._replace(corrupt=corrupt)
            return windows

        return read

    def _went_back(self, plan: Plan, result: StepResult) -> bool:
        """Returns whether the step just made sends the run back to a checkpoint.

        Raises:
            RunError: train.on_bad_step asks to stop, or there were too many bad steps.
        """
        fault = result.fault
        if documents := bad_documents(result.bad_lanes, plan):
            fault += f" ({self.data.place_of(documents)})"
        back = self.bad_steps.must_roll_back(self.step, fault, self.engine.skipped_in_a_row)
        if back:
            self._roll_back(fault)
        return back

    def _roll_back(self, fault: str) -> None:
        """Goes back to the newest valid checkpoint; this step's window will not be read again.

        The steps from there on are made again. Whatever the fault left in weights, optimizer states
        or memories is gone, as if the run had never read that window.
        """
        bad = self.step
        self._finish_saving()
        found, _ = checkpoint.find(self.config)
        if not found:
            raise RunError(f"{fault} at step {bad + 1}, and there is no valid checkpoint")
        state = checkpoint.read_state(found, self.config)
        load_from = checkpoint.source(found, state, self.config)
        self.lanes.load_state(state["lanes"])
        self._load(Saved(found, load_from, state))
        self.bad_steps.rolled_back(bad)
        if self.monitor:
            self.monitor.go_back_to(self.step)
        self._say(
            f"step {bad + 1}: {fault}; back to {found}, from where step {bad + 1} will be skipped"
        )

    def _load(self, saved: Saved) -> None:
        self.engine.load(saved.directory, saved.load_from, saved.state)
        self.step, self.tokens = saved.state["step"], saved.state["tokens"]
        self.saved = self.step

    def _skip_step(self) -> None:
        """Counts a step without reading its window."""
        plan = self.lanes.next_plan()
        self.engine.skip_window(torch.from_numpy(plan.starts.any(axis=1)))
        self.step += 1
        if self.monitor:
            counts = self._count_bad_steps()
            self.monitor.record(self.step, {f"train/{k}": v for k, v in counts.items()})

    def _count_bad_steps(self) -> dict[str, int]:
        return {
            "skipped_steps": self.engine.skipped_steps,
            "rollbacks": self.bad_steps.rollbacks,
        }

    def _evaluation_is_due(self) -> bool:
        every = self.config.evaluation.every
        return bool(every) and self.step > 0 and self.step % every == 0

    def _ended_before_evaluation(self) -> bool:
        """Whether the process that saved this step ended during its evaluation."""
        ended = self.monitor is not None and not self.monitor.has_evaluation(self.step)
        return bool(self.engine.all_sum(torch.tensor(float(ended), device=self.engine.device)))

    def _evaluate(self) -> dict[str, float]:
        """Measures held-out quality with and without memory, and records the memory's state."""
        quality = self.held_out.evaluate()
        gates, means = self.engine.describe_memory()
        norms = {f"memory/norm_of_block_{block:03d}": mean for block, mean in means.items()}
        self.sample = self._write_sample()
        self.evaluated = self.step == self.config.train.steps
        if self.monitor:
            self.monitor.record(self.step, quality | norms)
            self.monitor.gates(self.step, gates)
            if self.sample:
                self.monitor.text(self.step, "sample", self.sample)
            if quality:
                self.monitor.say(
                    f"step {self.step}: held-out bits per byte "
                    f"{quality['held_out/bits_per_byte']:.4f} with memory, "
                    f"{quality['held_out_without_memory/bits_per_byte']:.4f} without"
                )
        return quality

    def _write_sample(self) -> str:
        """Generates text with the model as it is now; empty if the config asks for none."""
        settings = self.config.evaluation
        if not settings.sample_tokens:
            return ""
        tokenizer = self.data.tokenizer
        prompt = [tokenizer.bos_id, *tokenizer.encode(settings.sample_prompt)]
        tokens = self.engine.generate(prompt, settings.sample_tokens, 0.8, self.step)
        return settings.sample_prompt + tokenizer.decode(tokens)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "tokens": self.tokens,
            **self._count_bad_steps(),
            "lanes": self.lanes.state(),
            "store": self.data.fingerprint,
            "stores": {name: store.fingerprint for name, store in self.data.stores.items()},
            "directory": os.getcwd(),
        }
        begin = time.perf_counter()
        with self.watchdog.patient():
            if self.background:
                self.background.start(state)
            else:
                directory = checkpoint.save(self.engine, self.config, state, self.watchdog.progress)
        self.saved = self.step
        self.bad_steps.saved(self.step)
        if self.monitor:
            self.monitor.record(self.step, {"seconds/saving": time.perf_counter() - begin})
            if not self.background:
                self._saved(directory)

    def _saved(self, directory: Path) -> None:
        """Reports a checkpoint that is complete, on rank 0."""
        checkpoint.delete_universal(self.config)
        self._say(f"step {Checkpoint(directory).step}: saved {directory}")

    def _finish_saving(self) -> None:
        """Waits for a checkpoint that is being written in the background."""
        if self.background:
            with self.watchdog.patient():
                self.background.finish()

    def _epochs(self) -> dict[str, float]:
        """Returns the passes over the corpus, or over each corpus of a mixture."""
        if isinstance(self.lanes, CurriculumLanes) or not self.lanes.corpus_epochs:
            return {"train/epoch": self.lanes.epoch}
        epochs = zip(self.data.stores, self.lanes.corpus_epochs, strict=True)
        return {f"train/epoch/{name}": epoch for name, epoch in epochs}

    def _introduce(self, opened: Opened) -> None:
        config, layout = self.config, self.engine.layout
        self._say(f"computes in {config.train.dtype}: {opened.why_dtype}")
        self._say(
            f"model: {count_parameters(config.model) / 1e6:.1f} M parameters, "
            f"{config.model.num_layers} layers, {config.train.batch_size} lanes, windows of "
            f"{config.train.window_segments} segments of {config.model.segment_length} tokens"
        )
        if config.optimizer.train:
            trained = sum(trained_counts(config.model, config.optimizer.train))
            self._say(f"trains {trained:,} of these parameters (optimizer.train), keeps all others")
        self._say(
            f"layout: {config.parallel.describe(layout.pipeline, layout.data)}, "
            f"{layout.micro_batches} micro-batches of {config.train.micro_batch_size} lanes in "
            f"{config.train.chunks} chunks, memories {config.parallel.memory_transport}, "
            f"{config.train.dtype}, ZeRO {config.parallel.zero_stage}"
        )
        self._say(layout.stages)
        for remark in opened.remarks:
            self._say(remark)
        begin = f"starting from {config.init_from}" if config.init_from else "starting at step 0"
        if opened.saved:
            begin = f"resumed from {opened.saved.directory} at step {self.step}"
        self._say(begin)
        steps, warmup = config.train.steps, config.optimizer.warmup_steps
        if self.step >= steps:
            self._say(f"nothing to train: train.steps is {steps}")
        elif warmup >= steps:
            self._say(
                f"optimizer.warmup_steps ({warmup}) is not below train.steps ({steps}): the "
                "learning rate will not get to its peak"
            )

    def _say(self, message: str) -> None:
        if self.monitor:
            self.monitor.say(message)


def _set_threads(config: RunConfig) -> None:
    told = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    # The variable may be left over from another launcher; a run has no more local processes than
    # processes in all.
    local = max(1, min(int(told), int(os.environ.get("WORLD_SIZE", "1"))))
    cores = min(psutil.cpu_count(logical=False) or 1, cores_at_hand())
    torch.set_num_threads(config.train.threads or max(1, cores // local))
