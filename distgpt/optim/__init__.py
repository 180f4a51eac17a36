"""The optimizers, one file each (`optimizers.OPTIMIZERS` lists them), and the learning-rate schedules."""
