"""NetworkPolicy: what may talk to what, compiled to one nftables table of this node."""
