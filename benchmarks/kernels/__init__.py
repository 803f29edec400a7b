"""How fast the kernels are on this GPU, beside others' and beside what its memory allows."""
