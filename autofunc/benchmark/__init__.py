"""Benchmarks of pipelines: contenders from a grid, timed in turns, and reported as tables, a picture and a page."""

from autofunc.benchmark.contender import Contender, LeftOut
from autofunc.benchmark.grid import Grid
from autofunc.benchmark.record import Measured, Record
from autofunc.benchmark.results import Results
from autofunc.benchmark.run import bench

__all__ = ["Contender", "Grid", "LeftOut", "Measured", "Record", "Results", "bench"]
