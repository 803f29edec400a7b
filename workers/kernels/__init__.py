"""Kernels that multiply by packed weights of 3 to 8 bits. Only this folder knows CuPy, and imports it late."""
