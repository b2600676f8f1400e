"""Samples: loading datasets, partitioning them over clients, removing modalities, and wording prompts."""
