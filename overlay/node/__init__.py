"""This machine: its links and addresses, the underlay, the tunnel device, bridges of pods, lost subnets."""
