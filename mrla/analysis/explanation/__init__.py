"""What a network's blocks hear of one another, and what of it does anything."""
