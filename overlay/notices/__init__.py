"""What Kubernetes' users see of this node's problems: Events on the Node and a condition (`kubectl describe node`)."""
