"""Reports, figures, documents and model cards."""
