"""The stores behind one contract (lease/store.py): etcd, and the Nodes of a Kubernetes cluster."""
