"""How rows become batches: in training, and otherwise in validation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from autofunc.config.kinds import MicrobatchRows, RowLength, Section


class Dataloader(Section):
    """How rows become batches."""

    shuffle: bool = Field(True, description="draw rows in an order that depends on the seed")
    drop_last: bool = Field(False, description="leave out a short last batch, of each dataset")
    num_workers: Annotated[int, Field(ge=0, le=1 << 10)] = Field(0, description="processes that load rows")
    pad_seq_len_divisible: RowLength | None = Field(
        None, description="fill rows of a batch up to the next multiple of this that the longest fits into"
    )
    pad_seq_len_to: Annotated[list[RowLength], Field(min_length=1, max_length=64)] | None = Field(
        None, description="fill rows of a batch up to the first of these lengths that the longest fits into"
    )

    @model_validator(mode="after")
    def _pads_in_one_way(self) -> Dataloader:
        if self.pad_seq_len_divisible is not None and self.pad_seq_len_to is not None:
            raise ValueError(
                "pad_seq_len_divisible and pad_seq_len_to both say what rows are filled up to; give one of them"
            )
        return self


class ValidationDataloader(Section):
    """How rows of the validation datasets become batches, where that is otherwise than in training."""

    batch_size: MicrobatchRows | None = Field(
        None, description="rows of one microbatch in validation; by default step_scheduler.local_batch_size"
    )
    drop_last: bool | None = Field(None, description="leave out a short last batch; by default as dataloader says")
    num_workers: Annotated[int, Field(ge=0, le=1 << 10)] | None = Field(
        None, description="processes that load rows; by default as dataloader says"
    )
