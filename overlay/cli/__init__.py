"""The operator's command `overlay`. rich and click live only here."""
