"""Attention over pages in plain torch: `padded` all rows at once (a GPU), `ragged` one row after another."""
