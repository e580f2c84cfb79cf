"""One training run: its parts, its folder, and what happens between its phases."""
