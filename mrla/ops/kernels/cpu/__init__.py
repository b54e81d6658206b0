"""Compiled CPU kernels: what the operators do, plane by plane, in one pass over memory; loaded when first used."""
