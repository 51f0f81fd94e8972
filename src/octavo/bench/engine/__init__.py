"""What `octavo bench engine` runs: steps of the engine against the bytes that they must read, and mixed requests."""
