"""What a run is: every key of its configuration (`schema`), and reading it from YAML and overrides (`loader`)."""
