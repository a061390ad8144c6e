"""Benchmarks of pipelines: contenders from a grid, measured in turn, and reported as a table, a picture and a page."""

from autofunc.benchmark.bench import bench
from autofunc.benchmark.grid import Contender, Grid, LeftOut
from autofunc.benchmark.record import Measured, Record

__all__ = ["Contender", "Grid", "LeftOut", "Measured", "Record", "bench"]
