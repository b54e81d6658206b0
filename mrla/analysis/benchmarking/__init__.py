"""What arms cost: time, memory, and one block at any place of a chain."""
