"""Two folders that must behave alike, one on a live mount and one on a tmpfs; a random walk looks for a difference."""
