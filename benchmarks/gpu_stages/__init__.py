"""What ``gpu.py`` measures, a stage a process: ``python -m gpu_stages STAGE ROWS --device cuda --seconds 60``."""
