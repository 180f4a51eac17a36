"""What keeps a run safe: checks before it starts, signals, the watchdog, and the lock on its output folder."""
