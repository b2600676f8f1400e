"""``python -m fedmllm``."""

from fedmllm.cli.main import main

if __name__ == "__main__":
    main()
