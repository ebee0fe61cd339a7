"""Image shards to latent shards: a task per input shard, each committed by one rename."""
