"""One run: takes an experiment and writes a run folder."""
