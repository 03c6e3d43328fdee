"""The way to an etcd server: its client, the gRPC channel below it, its messages."""
