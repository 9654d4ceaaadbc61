"""A bias on the decision, per request, for vLLM: think more, or less, without training.

    --logits-processors hgpo_trl.serving.vllm_decision:DecisionBias

A request asks for it with `vllm_xargs: {"decision_bias": 1.5}`; `--additional-config '{"decision_bias": 1.5}'` is the
server's default. The log-odds of thinking, logit(think) − logit(no_think), move by that much where the modes' openings
part: at the first generated token, or behind the beginning that they share.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from hgpo_trl.modes import mode_tokens
from hgpo_trl.modes.decision import move_decision

try:  # vLLM has two model runners, each with an interface of its own; the older versions have the first alone
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError:

    class LogitsProcessorV2:  # type: ignore[no-redef]
        """Stands in for the interface that this vLLM lacks."""


FIELD = "decision_bias"


class DecisionBias(LogitsProcessor, LogitsProcessorV2):
    """Adds half the bias to think's logit and subtracts half from no-think's, only where the modes' openings part.

    Where the prompt ends with a mode's opening the decision is made, and nothing is changed. Where one mode is any
    token but the other's (OTHER), the other's logit takes all of the bias.
    """

    def __init__(self, vllm_config: Any, state_or_device: Any, is_pin_memory: bool = False) -> None:
        """Called by vLLM: with the requests' state by its second model runner, with a device by its first."""
        model = vllm_config.model_config
        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
        )
        tokens = mode_tokens(tokenizer)
        self._tokens, self._prefix = tokens, list(tokens.prefix)
        self._openings = [list(opening) for opening in tokens.openings if opening]
        self._default = _checked((vllm_config.additional_config or {}).get(FIELD, 0.0), "--additional-config")
        self._waiting: dict[int, tuple[float, list[int]]] = {}  # first runner: row -> bias, generated tokens
        if not isinstance(state_or_device, torch.device | str):
            self._state = state_or_device
            self._biases = torch.zeros(self._state.max_num_reqs, device=self._state.device)  # by request slot
            last = [opening[-1] for opening in self._openings]
            self._last = torch.tensor(self._prefix[-1:] or last, device=self._state.device)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request whose bias is not a number; its sender gets status 400."""
        _checked((sampling_params.extra_args or {}).get(FIELD, 0.0), "vllm_xargs")

    def _bias(self, params: SamplingParams) -> float:
        return _checked((params.extra_args or {}).get(FIELD, self._default), "vllm_xargs")

    # --- first model runner ---

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._waiting, batch_update, self._enter)
        # A row is dropped once its request is past the decision or goes another way, and not taken up again when it
        # comes back from preemption.
        self._waiting = {row: entry for row, entry in self._waiting.items() if self._may_decide(entry[1])}

    def _may_decide(self, generated: list[int]) -> bool:
        return list(generated) == self._prefix[: len(generated)]

    def _enter(
        self, params: SamplingParams, prompt: list[int] | None, generated: list[int]
    ) -> tuple[float, list[int]] | None:
        bias = self._bias(params)
        forced = any(prompt and list(prompt[-len(opening) :]) == opening for opening in self._openings)
        decided = forced or not self._may_decide(generated)
        return None if decided or not bias else (bias, generated)

    # --- second model runner ---

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        bias = self._bias(sampling_params)
        self._biases[req_idx] = bias
        return bias != 0

    # --- both ---

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Change the logits [rows, vocabulary] of this step in place."""
        if ctx is not None:
            slots = ctx.expanded_idx_mapping
            here = ctx.pos + 1 == self._state.prompt_len.gpu[slots] + len(self._prefix)
            found = torch.isin(ctx.input_ids, self._last)  # the end of the prefix, or without one of a forced opening
            biases = self._biases[slots] * (here & (found if self._prefix else ~found))
            return move_decision(logits, self._tokens, biases)
        deciding = {row: bias for row, (bias, ids) in self._waiting.items() if len(ids) == len(self._prefix)}
        if deciding:
            rows = torch.tensor(list(deciding), device=logits.device)
            biases = torch.tensor(list(deciding.values()), device=logits.device)
            return move_decision(logits, self._tokens, biases, rows)
        return logits


def _checked(value: Any, where: str) -> float:
    """Return the bias as a float; ValueError if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{FIELD} must be a finite number, in {where}; got {value!r}.")
    return float(value)
