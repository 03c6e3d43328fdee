"""The whole network in one picture: what agents say of themselves and of each other, as values, and as a page."""
