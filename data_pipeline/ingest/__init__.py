"""Image shards of all common kinds, as one stream of raw samples a shard."""
