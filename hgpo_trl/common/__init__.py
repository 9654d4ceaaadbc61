"""Files, errors, environment, seeds and data files: what every other room uses."""
