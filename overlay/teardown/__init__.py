"""Taking away what is ours: from this node, and from the store."""
