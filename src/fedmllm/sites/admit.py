"""Admits the sites of a ``server.yaml`` by their public keys and prints when the server is ready. ``python -m fedmllm.sites.admit server.yaml``."""

from __future__ import annotations

import sys
from pathlib import Path

from fedmllm.flower.settings import ServerConfig


def main() -> None:
    """Run the process. It waits for the SuperLink."""
    server = ServerConfig.load(Path(sys.argv[1]))
    server.link.register()
    print(f"admitted   {', '.join(server.sites)}\nready at   {server.address}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
