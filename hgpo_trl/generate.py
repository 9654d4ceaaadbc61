"""Short public name of `hgpo_trl.inference.generate`."""

from hgpo_trl.inference.decoding import DecisionBias
from hgpo_trl.inference.generate import Generation, HybridModel, generate, stream

__all__ = ["DecisionBias", "Generation", "HybridModel", "generate", "stream"]
