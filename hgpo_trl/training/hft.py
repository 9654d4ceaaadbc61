"""Stage I on rows of unequal length: little padding, and the decision weighs alike in both modes.

SFT's loss is a mean over the tokens of an optimizer step. The decision token of a row therefore weighs 1/T in a step of
T tokens, and P(think) only comes out as the share of think examples if every step holds rows of both modes, drawn
randomly. `train_sampling_strategy: batch_rebalance` of Transformers does that, and sorts rows by length within the step
alone, into micro-batches of about equal cost. `group_by_length` fills whole steps with rows of like length, that is of
one mode: the decision weighs many times more in a step of short no-think rows than in one of traces.
"""

from typing import Any, cast

import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler
from trl import SFTTrainer

from hgpo_trl.common.errors import UserError
from hgpo_trl.training.resume import SetEpoch

_BATCH_ROWS = 1_000


def check_sampling(args: TrainingArguments) -> None:
    """Refuse a sampling strategy that fills optimizer steps with rows of one mode.

    Raises:
        UserError: `train_sampling_strategy` is group_by_length.
    """
    if args.train_sampling_strategy == "group_by_length":
        raise UserError(
            "train_sampling_strategy='group_by_length' fills an optimizer step with rows of like length, and so of one "
            "mode. The loss is a mean over the step's tokens: the decision token of a short no-think row would weigh "
            "many times more than that of a trace, and the model would hardly think. Use batch_rebalance: it draws the "
            "rows of a step randomly and sorts them by length into its micro-batches."
        )


def row_lengths(dataset: Dataset) -> list[int]:
    """Tokens of every row of a tokenised data set, `[N]`, without making lists of the tokens."""
    batches = dataset.select_columns("input_ids").with_format("arrow").iter(_BATCH_ROWS)
    return [length for batch in batches for length in pc.list_value_length(batch["input_ids"]).to_pylist()]


class HFTTrainer(SFTTrainer):
    """TRL's SFTTrainer for Stage I (Eq. 4).

    It refuses group_by_length (`check_sampling`). The order of batch_rebalance follows `data_seed` or `seed`, where
    Transformers 5.17 has a constant, and goes on in a resumed run. Everything else is TRL's.

    Raises:
        UserError: see `check_sampling`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_sampling(self.args)
        self.add_callback(SetEpoch)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Trainer's, seeded. It gets a data set of the rows' lengths, so that it need not read the rows."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "batch_rebalance" or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        lengths = Dataset.from_dict({self.args.length_column_name: row_lengths(dataset)})
        sampler = cast(BatchRebalanceSampler, super()._get_train_sampler(lengths))
        sampler.seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return sampler
