"""Data for both stages: from any list of sources to hybrid SFT examples (HFT) and to prompts (HGPO)."""
