"""Kernels that multiply by packed weights of 3 to 8 bits. Only this folder knows CuPy, and imports it late."""

from workers.kernels import backend, launch

__all__ = ["backend", "launch"]
