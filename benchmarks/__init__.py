"""Programs that measure at full size. `random_checkpoints` makes what they measure on, with no download."""
