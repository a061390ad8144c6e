"""From computations to the full program: sends, receives and sharding actions are put between them."""
