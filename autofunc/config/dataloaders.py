"""The sections `dataloader` and `validation_dataloader`: how rows are batched."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from autofunc.config.kinds import MicrobatchRows, RowLength, Section


class Dataloader(Section):
    """How rows are batched."""

    shuffle: bool = Field(True, description="draw rows in an order that depends on the seed")
    drop_last: bool = Field(False, description="drop each dataset's last batch if it is short")
    num_workers: Annotated[int, Field(ge=0, le=1 << 10)] = Field(0, description="processes that load rows")
    pad_seq_len_divisible: RowLength | None = Field(
        None, description="pad the rows of a batch to a multiple of this, the first that fits the longest row"
    )
    pad_seq_len_to: Annotated[list[RowLength], Field(min_length=1, max_length=64)] | None = Field(
        None, description="pad the rows of a batch to the first of these lengths that fits the longest row"
    )

    @model_validator(mode="after")
    def _check_padding(self) -> Dataloader:
        if self.pad_seq_len_divisible is not None and self.pad_seq_len_to is not None:
            raise ValueError("pad_seq_len_divisible and pad_seq_len_to both set the padded length; give one of them")
        return self


class ValidationDataloader(Section):
    """How rows of the validation datasets are batched, where it differs from training."""

    batch_size: MicrobatchRows | None = Field(
        None, description="rows per microbatch in validation; by default step_scheduler.local_batch_size"
    )
    drop_last: bool | None = Field(None, description="drop a short last batch; by default as in dataloader")
    num_workers: Annotated[int, Field(ge=0, le=1 << 10)] | None = Field(
        None, description="processes that load rows; by default as in dataloader"
    )
