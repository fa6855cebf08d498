"""Triton kernels, one file an op; imported as pgn_fast.kernels."""
