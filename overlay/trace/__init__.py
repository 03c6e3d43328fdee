"""The way of a packet through this node and the peer's, step by step, proven by probes that are counted at each step."""
