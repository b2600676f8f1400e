"""Vision-language models: loading, encoding, adapters, and the embedded one."""
