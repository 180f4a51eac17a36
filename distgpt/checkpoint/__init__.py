"""Checkpoints that are complete or absent: the store on disk, saving in the background, and trained weights."""
