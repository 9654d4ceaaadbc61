"""Resuming: an order of the data that depends on the epoch alone, and rollouts saved in the middle of their use."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler


class EpochSampler(Sampler):
    """TRL's sampler with an order that depends on the seed and the epoch alone; epoch 0 has TRL's order.

    TRL draws the order of every epoch from one generator. A resumed run starts that generator anew, and would repeat
    the order of the first epoch.
    """

    def __init__(self, sampler: RepeatSampler, seed: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The training loop calls it before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class SetEpoch(TrainerCallback):
    """Tell the sampler which epoch begins, however deep it lies in the data loader.

    Transformers 5.17 looks for it below one wrapper. Several processes that resume within an epoch have two
    (accelerate's shard, and the skipping of batches): the sampler would repeat the order of epoch 0.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        sampler = kwargs["train_dataloader"].batch_sampler
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


def save_rollout(checkpoint: Path, process_index: int, step: int, micro_batches: Any) -> None:
    """Save a process's micro-batches beside a checkpoint.

    Args:
        step: micro-batches computed so far in the run.
        micro_batches: of the rollout that the next step goes on with.
    """
    torch.save({"step": step, "micro_batches": micro_batches}, _rollout_file(checkpoint, process_index))


def load_rollout(checkpoint: Path, process_index: int, device: torch.device) -> tuple[int, Any] | None:
    """Load `(step, micro_batches)` that `save_rollout` has saved; None where the checkpoint ends with its rollout."""
    path = _rollout_file(checkpoint, process_index)
    if not path.is_file():
        return None
    rollout = torch.load(path, map_location=device, weights_only=True)
    return rollout["step"], rollout["micro_batches"]


def _rollout_file(checkpoint: Path, process_index: int) -> Path:
    return checkpoint / f"rollout_{process_index}.pt"


class ResumableTrainer(GRPOTrainer):
    """GRPOTrainer whose resumed runs see the data in the same order, and use up the rollout that was interrupted."""

    args: Any  # GRPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(SetEpoch)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        """TRL's, in an order that a resumed run goes on with."""
        return EpochSampler(cast(RepeatSampler, super()._get_train_sampler(dataset)), self.args.seed)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """TRL's checkpoint, with this process's rollout where the next step goes on with it."""
        super()._save_checkpoint(model, trial)
        if self._step % (self.args.steps_per_generation * self.num_iterations) != 0:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_rollout(folder, self.accelerator.process_index, self._step, self._buffered_inputs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, with the rollout that `_save_checkpoint` has saved."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            rollout = load_rollout(Path(checkpoint), self.accelerator.process_index, self.accelerator.device)
            if rollout is not None:
                self._step, self._buffered_inputs = rollout
