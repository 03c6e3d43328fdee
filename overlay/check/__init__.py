"""Does a peer, a node or a pod answer, and if not, why: asked once, at an operator's request."""
