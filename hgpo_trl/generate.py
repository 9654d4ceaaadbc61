"""Short public name of `hgpo_trl.inference.generate`."""

from hgpo_trl.inference.generate import DecisionBias, Generation, HybridModel, generate, stream

__all__ = ["DecisionBias", "Generation", "HybridModel", "generate", "stream"]
