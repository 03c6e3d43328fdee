"""What one peer looks like in the kernel, and what the device must be: one module a backend, pure."""
