"""Tasks of graded difficulty in plain English, for pretrained language models of any size.

Each module has what a source of the data builder needs (docs/data.md): `LEVELS` and `sample(level, rng, patterns)`.
Reasoning traces are short, one step a line, so that a model of 135 million parameters can learn to write them.

Every task asks its question in several sentence patterns. The last ones are kept apart, so that Stage II can do without
them and the evaluation can tell whether a decision depends on the question or on its wording: `patterns` is "main",
"other" or "all".
"""
