"""The kernels' own text run on a CPU, thread by thread, so that tests need no GPU."""
