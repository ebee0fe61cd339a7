"""From metadata and image shards to latent shards (offline), and from those to packed batches (online)."""
