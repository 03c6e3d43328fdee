"""Records as they stand in a store, read and written: etcd's keys and values, Nodes' annotations; and packed in memory."""
