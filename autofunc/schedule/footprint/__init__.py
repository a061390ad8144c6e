"""Live values on each rank, in bytes or activations, and which share memory."""
