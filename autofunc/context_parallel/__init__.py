"""Context parallelism: tokens cut over ranks, and what operators do that mix them."""
