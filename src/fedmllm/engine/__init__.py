"""The round loop, the in-process engine, and the checkpoints from which an interrupted run resumes."""
