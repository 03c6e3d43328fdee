"""Packets of the tunnel as they pass, decoded, or as a file for Wireshark."""
