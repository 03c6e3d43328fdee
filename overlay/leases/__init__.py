"""The leases of a network as the store has them: without an agent, from any machine that reaches etcd."""
