"""One run: an experiment in, a folder out."""
