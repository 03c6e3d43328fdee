"""WireGuard devices: the kernel's by generic netlink, and those of a program by its socket."""
