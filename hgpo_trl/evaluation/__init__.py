"""Sampling in both modes, scores, metrics, comparisons, baselines and the difficulty filter."""
