"""Checks of operations and decoders that the tests run, and tools/check_cuda.py where a GPU is."""
