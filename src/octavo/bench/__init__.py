"""What `octavo bench` runs; its records lie in the repository's `bench/results/`."""
