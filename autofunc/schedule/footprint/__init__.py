"""What is alive on each rank, in bytes or in activations, and what shares memory."""
