"""The architectures, one file each (`config.MODELS` lists them), and what they share: attention, cross-entropy."""
