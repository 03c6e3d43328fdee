"""Who owns which subnet. Knows nothing of kernels; could be used alone."""
