"""The store's side: records as they come, our own lease, and the files an operator changes while the agent runs."""
