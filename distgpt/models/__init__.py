"""The architectures, one file each (`architectures.MODELS` lists them), and what they share."""
