"""torch.optim as pure functions: an optimizer as (init, update), the learning rate as a function of the step."""

from autofunc.optim.average import ema
from autofunc.optim.learning_rate import LearningRate, lr_schedule
from autofunc.optim.update import Optimizer, optimizer, optimizers

__all__ = ["LearningRate", "Optimizer", "ema", "lr_schedule", "optimizer", "optimizers"]
