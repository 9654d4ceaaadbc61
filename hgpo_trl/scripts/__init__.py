"""Entry points, one per stage: `hgpo-trl STAGE --config recipe.yaml`, or `accelerate launch -m hgpo_trl.scripts.STAGE`."""
