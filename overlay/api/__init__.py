"""What the agent answers: status, metrics, health, on a socket and on a port."""
