"""Context parallelism: tokens cut over ranks, and the operators that mix tokens."""
