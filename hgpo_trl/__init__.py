"""Hybrid Group Policy Optimization for TRL: language models that learn when to think (arXiv 2505.14631)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hgpo_trl.training.config import HGPOConfig
    from hgpo_trl.training.trainer import HGPOTrainer

__all__ = ["HGPOConfig", "HGPOTrainer", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the trainer on first use, so that `hgpo-trl --help` does not load torch."""
    if name == "HGPOConfig":
        from hgpo_trl.training.config import HGPOConfig

        return HGPOConfig
    if name == "HGPOTrainer":
        from hgpo_trl.training.trainer import HGPOTrainer

        return HGPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
