"""Agents ask each other, with a secret that they share: their status, and to count probes at the other end of a trace."""
