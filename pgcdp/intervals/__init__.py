"""Floor 5: from captured writes to intervals and their increments."""
