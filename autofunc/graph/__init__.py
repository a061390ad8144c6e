"""What the engine and captured models both do with graphs of operators."""
