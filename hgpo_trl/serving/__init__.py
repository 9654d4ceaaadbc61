"""Serving hybrid-reasoning models: responses taken apart while they arrive, and vLLM's server."""
