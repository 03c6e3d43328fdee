"""WireGuard: this node's key, and its peers on the device."""
