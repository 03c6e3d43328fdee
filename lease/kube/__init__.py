"""The way to a Kubernetes API server: its client, the watch of any resource, and objects read from protobuf and JSON."""
