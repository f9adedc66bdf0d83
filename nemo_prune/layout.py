"""What lies where in a release, as paths relative to its folder."""

CARD_FILE = "README.md"
RECORD_FILE = "nemo_prune.json"
MASK_FILE = "nemo_prune/mask.safetensors"
GRID_FILE = "nemo_prune/before_after.png"
