"""From computations to the full program: insertion of sends, receives and sharding actions."""
