"""What pods are made by: subnet.env and the CNI network list."""
