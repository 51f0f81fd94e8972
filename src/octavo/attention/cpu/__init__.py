"""The kernels in C (`_kernels`): `job.h` says what they are asked, `kernels.py` checks and packs it."""
