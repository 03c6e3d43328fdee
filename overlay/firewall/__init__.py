"""nftables: who may send VXLAN, what pods may send, masquerade, other programs' forward chains."""
