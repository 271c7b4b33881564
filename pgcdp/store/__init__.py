"""Floor 4: the bytes of the backup side."""
