"""rtnetlink: entries as values, messages, links."""
