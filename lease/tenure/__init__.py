"""How a node gets its subnet and keeps it: evidence, allocation, transactions, renewal."""
