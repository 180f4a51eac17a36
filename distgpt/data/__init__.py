"""From token files to the batches of each rank: tokenizers, formats, the order of sequences, and loading."""
