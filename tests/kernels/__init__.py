"""What only other kernels have: run by `make kernels`."""
