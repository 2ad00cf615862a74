"""Ranked List Loss (Wang et al., CVPR 2019; TPAMI 2021) in JAX."""

__version__ = "0.1.0"
