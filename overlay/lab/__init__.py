"""Nodes as network namespaces on one machine: topology, processes, pods by CNI, cleaning up."""
