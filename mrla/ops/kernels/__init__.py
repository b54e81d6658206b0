"""Fused operators with their autograd, the epilogue of a residual block, and a folder for each backend."""
