"""Files that are written whole or not at all, and folders that one process writes at a time."""
