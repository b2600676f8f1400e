"""The measurements of ``gpu.py``, one process per stage: ``python -m gpu_stages STAGE ROWS --device cuda --seconds 60``."""
