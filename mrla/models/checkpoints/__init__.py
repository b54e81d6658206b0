"""Networks as files: one store, one reader of tensors, the released checkpoints and Paddle's, the hub."""
