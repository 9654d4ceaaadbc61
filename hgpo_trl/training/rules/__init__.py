"""Rules for learning when to think, by name: what `mode_rule` chooses from. docs/rules.md compares them."""

import inspect
from typing import Any

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.imports import load_function
from hgpo_trl.training.rules.adaptthink import AdaptThink
from hgpo_trl.training.rules.base import Groups, Rule
from hgpo_trl.training.rules.grpo import GRPO
from hgpo_trl.training.rules.hgpo import HGPO
from hgpo_trl.training.rules.stable_adaptive import StableAdaptive
from hgpo_trl.training.rules.thinkless import Thinkless

RULES: dict[str, type[Rule]] = {
    "hgpo": HGPO,
    "adaptthink": AdaptThink,
    "thinkless": Thinkless,
    "stable_adaptive": StableAdaptive,
    "grpo": GRPO,
}

__all__ = ["RULES", "Groups", "Rule", "build_rule", "load_rule"]


def load_rule(name: str) -> type[Rule]:
    """Find a rule by its name in `RULES`, "package.module.Class" or "path/to/file.py:Class".

    Raises:
        UserError: there is no such rule, module, file or class, or it is no subclass of `Rule`.
    """
    if name in RULES:
        return RULES[name]
    if "." not in name:
        raise UserError(
            f"mode_rule must be one of {', '.join(RULES)}, or your own as package.module.Class or "
            f"path/to/file.py:Class; got {name!r}."
        )
    found = load_function("mode_rule", name)
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise UserError(f"mode_rule={name!r} must be a subclass of hgpo_trl.training.rules.Rule.")
    return found


def build_rule(args: Any, **options: Any) -> Rule:
    """Build the rule that an `HGPOConfig` names, with its `mode_rule_kwargs`.

    Args:
        options: further keyword arguments of the rule.

    Raises:
        UserError: see `load_rule`, or the rule does not take an option or its value.
    """
    rule = load_rule(args.mode_rule)
    options = {**(args.mode_rule_kwargs or {}), **options}
    taken = [name for name in inspect.signature(rule).parameters if name != "args"]
    if unknown := [name for name in options if name not in taken]:
        raise UserError(
            f"mode_rule={args.mode_rule} has no option {', '.join(unknown)}. "
            f"It takes {', '.join(taken) if taken else 'none'}."
        )
    return rule(args, **options)
