"""The other nodes: which records are peers, what each needs in the kernel, and making it so."""
