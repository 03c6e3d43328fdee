"""What this node's kernel holds: the VXLAN overlay agent."""

__version__ = "0.1.0"
