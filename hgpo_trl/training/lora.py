"""LoRA (PEFT): the mode tags' embedding rows are trained with it, kept in the adapter and merged with it.

PEFT's `trainable_token_indices` trains these rows alone: four per matrix, where `modules_to_save` would train, save and
optimise whole embedding matrices.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import align_special_tokens

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import LHRM, ModeTokens, add_mode_tokens, declare_format, mode_tokens

if TYPE_CHECKING:  # an extra: imported only where LoRA is used
    from peft import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"


def train_tag_rows(config: "LoraConfig", tokens: ModeTokens, model: PreTrainedModel) -> None:
    """Train the tags' rows of the input embedding and, where it is not tied, of the output embedding too.

    A model with marks of its own has learned their rows long ago: they are left as they are. An embedding that `config`
    already trains, by `modules_to_save` or `target_modules`, is left as it is.

    Args:
        config: changed in place.
        model: not yet wrapped; only the names and kinds of its modules matter, so it may be on the meta device.

    Raises:
        UserError: the output embedding has a bias, which PEFT's trainable tokens would drop.
    """
    if tokens.mode_format != LHRM:
        return
    from peft.tuners.tuners_utils import check_target_module_exists

    names = {module: name for name, module in model.named_modules()}
    output = model.get_output_embeddings()
    embeddings = [module for module in (model.get_input_embeddings(), output) if module is not None]

    def trained_anyway(module: nn.Module) -> bool:
        kept = any(names[module].endswith(name) for name in config.modules_to_save or ())
        return kept or bool(config.target_modules and check_target_module_exists(config, names[module]))

    chosen = [module for module in embeddings if not trained_anyway(module)]
    if model.config.tie_word_embeddings and len(chosen) < len(embeddings):
        return  # tied: to train either embedding trains the tags' rows of both
    if output in chosen and getattr(output, "bias", None) is not None:
        raise UserError(
            f"use_peft: the output embedding {names[output]} of {model.config.model_type} has a bias, which PEFT drops "
            f"where it trains single rows. Train it whole (lora_modules_to_save: [{names[output]}]), or without LoRA."
        )
    # PEFT finds an embedding by the last part of its name, however deep a model class nests it. For tied embeddings it
    # makes the rows of both names one parameter.
    rows = {names[module].rpartition(".")[2]: list(tokens.ids) for module in chosen}
    config.trainable_token_indices = rows or None


def prepare_wrapped(model: Any) -> None:
    """Prepare a `PeftModel` for TRL's loss and for saving; call it before training.

    TRL's fused LM head reads `weight` and `bias` of the output embedding, but PEFT's wrapper for single rows has no
    `bias` (`train_tag_rows` has refused models that have one). And where the tags made the embeddings grow, PEFT would
    save them whole, gigabytes; the adapter's rows and `add_mode_tokens` are enough to restore them.
    """
    from peft.utils.other import TrainableTokensWrapper

    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            vars(module)["bias"] = None  # nothing reads the input embedding's
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)


def is_adapter(name: str) -> bool:
    """Whether a name is a folder with an adapter."""
    return (Path(name) / ADAPTER_CONFIG).is_file()


def load_merged(
    adapter: str, base: str, revision: str | None, **config_changes: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model in float32, merge an adapter of a training stage into it, and load the adapter's tokenizer.

    Embeddings that grew for the tags in training grow again in the same way. Tied embeddings stay tied, unless the
    adapter has trained one of the two alone (`lora_modules_to_save`, `lora_target_modules`).

    Args:
        config_changes: entries of the base model's config that the training has changed, such as its positions.

    Raises:
        UserError: the adapter's tokenizer lacks the mode tags, or gives them other ids than the base model's does.
    """
    from peft import PeftConfig, PeftModel

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokens = mode_tokens(tokenizer)
    base_tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
    model = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=torch.float32, **config_changes)
    if tokens.mode_format == LHRM:
        add_mode_tokens(base_tokenizer, model)
    else:
        declare_format(base_tokenizer, tokens.mode_format)
    if (found := mode_tokens(base_tokenizer)) != tokens:
        raise UserError(
            f"The adapter {adapter!r} was trained with the tags' ids {tokens.ids}, but its base model {base!r} has "
            f"{found.ids}: it is another model than the one that was trained."
        )
    config: Any = PeftConfig.from_pretrained(adapter)
    apart = model.config.tie_word_embeddings and config.trainable_token_indices is None
    if apart:  # merging into one of two tied embeddings would change the other
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    merged = cast(Any, PeftModel.from_pretrained(model, adapter)).merge_and_unload()
    if apart and merged.get_output_embeddings().weight.equal(merged.get_input_embeddings().weight):
        merged.config.tie_word_embeddings = True
        merged.tie_weights()
    align_special_tokens(merged, tokenizer)  # as the Trainer does; generation ends with the tokenizer's eos
    return merged, tokenizer
