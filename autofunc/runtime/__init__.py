"""The runtime: executes programs over a transport. Side effects live here, in transports and buffers."""
