"""What users read: one line for an error, names that were meant, results in a few words."""
