"""Entry points, one per stage: `hgpo-trl STAGE --config recipe.yaml`, `accelerate launch -m hgpo_trl.scripts.STAGE`."""
