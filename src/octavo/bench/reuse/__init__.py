"""What `octavo bench reuse` runs: first tokens with and without a reuse store, traces of requests, policies."""
