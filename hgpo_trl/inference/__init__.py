"""Generation with a trained model in both backends."""
