"""Images: what they are, where they lie, and how they are sampled and loaded."""
