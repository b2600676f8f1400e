"""``python -m fedmllm``."""

from fedmllm.cli import main

if __name__ == "__main__":
    main()
