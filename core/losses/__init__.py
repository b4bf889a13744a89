"""Pure functions from embeddings to this rank's share of a loss over the global batch."""
