"""The kernel of this node: entries as values, netlink as the way to them. Knows no store and no setting."""
