"""What a network's blocks take from one another, and whether it matters."""
