"""Every arm with every seed, and what may be said of the difference."""
