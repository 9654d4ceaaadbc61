"""Serving hybrid-reasoning models: splitting of responses while they arrive, and plug-ins of vLLM's server."""
