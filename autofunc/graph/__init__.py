"""Tools for graphs of operators that the engine and captured models share."""
