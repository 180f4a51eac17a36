"""The optimizers, one file each (`config.OPTIMIZERS` lists them), and the learning-rate schedules."""
