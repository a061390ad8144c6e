"""Keys of other tools' configurations, and their equivalents here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_OFTEN = "step_scheduler.ckpt_every_steps, and a section checkpoint"
_RESUME = "checkpoint.restore_from: a folder, LATEST or AUTO"
_DCP = "not needed: torch.distributed.checkpoint is always used, and every layout can read it"
_DECAY = "lr_scheduler.lr_decay_style: cosine, linear, constant, inverse-square-root or WSD"
_WARMUP = "lr_scheduler.lr_warmup_steps"
_CONSTANT_WD = "weight decay is constant: optimizer.weight_decay"
_NO_STATE = "not needed: the learning rate depends on the step alone"
_LOGS = "metrics.jsonl in output_dir logs every step; sections tensorboard, wandb and mlflow send it on"
_TEXTS = "rows of one length, or dataloader.pad_seq_len_divisible; autofunc.data.PackedText packs texts"

_GLOBAL = "step_scheduler.global_batch_size, rows per step: accumulation steps times local_batch_size times dp_size"
_PRECISION = "distributed.mp_policy.param_dtype: bfloat16"
_BETAS = "optimizer.betas, a list of both"

HF_TRAINER: Mapping[str, str] = {
    "per_device_train_batch_size": "step_scheduler.local_batch_size",
    "per_device_eval_batch_size": "validation_dataloader.batch_size",
    "gradient_accumulation_steps": _GLOBAL,
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": _BETAS,
    "adam_beta2": _BETAS,
    "adam_epsilon": "optimizer.eps",
    "optim": "optimizer._target_, such as torch.optim.AdamW",
    "max_grad_norm": "clip_grad_norm.max_norm",
    "num_train_epochs": "step_scheduler.num_epochs",
    "max_steps": "step_scheduler.max_steps",
    "lr_scheduler_type": _DECAY,
    "lr_scheduler_kwargs": "lr_scheduler, such as lr_decay_steps and min_lr",
    "warmup_steps": _WARMUP,
    "warmup_ratio": f"{_WARMUP}, a number of steps",
    "bf16": _PRECISION,
    "fp16": f"float16 would need loss scaling, which is not supported; {_PRECISION}",
    "gradient_checkpointing": "distributed.remat: layer",
    "torch_compile": "distributed.compile",
    "eval_steps": "step_scheduler.val_every_steps",
    "eval_strategy": "step_scheduler.val_every_steps; validation always runs at the end",
    "evaluation_strategy": "step_scheduler.val_every_steps; validation always runs at the end",
    "do_train": "autofunc finetune",
    "do_eval": "validation_dataset",
    "save_steps": _OFTEN,
    "save_strategy": "step_scheduler.ckpt_every_steps and save_checkpoint_every_epoch, and a section checkpoint",
    "save_total_limit": "checkpoint.max_recent_checkpoints",
    "load_best_model_at_end": "checkpoint.restore_from: LOWEST_VAL",
    "resume_from_checkpoint": _RESUME,
    "logging_steps": _LOGS,
    "logging_dir": _LOGS,
    "report_to": "sections tensorboard, wandb and mlflow",
    "run_name": "output_dir",
    "data_seed": "seed",
    "dataloader_num_workers": "dataloader.num_workers",
    "dataloader_drop_last": "dataloader.drop_last",
    "fsdp": "distributed.strategy: fsdp2, and dp_size",
    "fsdp_config": "distributed.strategy: fsdp2, and dp_size",
    "deepspeed": "distributed.strategy: fsdp2, and dp_size",
    "ddp_timeout": "distributed.timeout_minutes",
    "model_name_or_path": "model: {_target_: autofunc.AutoModel.from_pretrained, pretrained_model_name_or_path: ...}",
    "tokenizer_name": "dataset.tokenizer",
    "dataset_name": "dataset: {_target_: ...}",
    "train_file": "dataset: {_target_: ..., path: ...}",
    "validation_file": "validation_dataset: {_target_: ..., path: ...}",
    "max_seq_length": "dataset.seq_len",
    "group_by_length": _TEXTS,
}

TORCHTITAN: Mapping[str, str] = {
    "job": "output_dir",
    "job.dump_folder": "output_dir",
    "model.name": "model._target_",
    "model.flavor": "the sizes of model._target_, one by one",
    "model.hf_assets_path": "dataset.tokenizer",
    "model.tokenizer_path": "dataset.tokenizer",
    "optimizer.name": "optimizer._target_, such as torch.optim.AdamW",
    "optimizer.beta1": _BETAS,
    "optimizer.beta2": _BETAS,
    "optimizer.implementation": "optimizer.fused or optimizer.foreach: true",
    "lr_scheduler.warmup_steps": _WARMUP,
    "lr_scheduler.decay_ratio": "lr_scheduler.wsd_decay_steps, with lr_decay_style: WSD",
    "lr_scheduler.decay_type": _DECAY,
    "lr_scheduler.min_lr_factor": "lr_scheduler.min_lr",
    "training.steps": "step_scheduler.max_steps",
    "training.local_batch_size": "step_scheduler.local_batch_size is rows per microbatch, global_batch_size per step",
    "training.batch_size": "step_scheduler.local_batch_size is rows per microbatch, global_batch_size per step",
    "training.global_batch_size": "step_scheduler.global_batch_size",
    "training.seq_len": "dataset.seq_len",
    "training.max_norm": "clip_grad_norm.max_norm",
    "training.seed": "seed",
    "training.dataset": "dataset: {_target_: ...}",
    "training.dataset_path": "dataset: {_target_: ..., path: ...}",
    "training.compile": "distributed.compile",
    "training.mixed_precision_param": "distributed.mp_policy.param_dtype",
    "training.mixed_precision_reduce": "distributed.mp_policy.reduce_dtype",
    "training.enable_cpu_offload": "distributed.offload_policy: cpu",
    "training": "step_scheduler, dataset and clip_grad_norm",
    "parallelism.data_parallel_replicate_degree": "distributed.dp_replicate_size",
    "parallelism.data_parallel_shard_degree": "distributed.dp_size, divided into dp_replicate_size groups",
    "parallelism.fsdp_reshard_after_forward": "distributed.reshard_after_forward",
    "parallelism.tensor_parallel_degree": "distributed.tp_size",
    "parallelism.pipeline_parallel_degree": "distributed.pp_size",
    "parallelism.pipeline_parallel_schedule": "distributed.schedule",
    "parallelism.pipeline_parallel_schedule_csv": "distributed.schedule",
    "parallelism.pipeline_parallel_split_points": "distributed.split_points",
    "parallelism.pipeline_parallel_layers_per_stage": "distributed.split_points, a number of stages",
    "parallelism.pipeline_parallel_microbatch_size": "step_scheduler.local_batch_size",
    "parallelism.context_parallel_degree": "distributed.cp_size",
    "parallelism.expert_parallel_degree": "distributed.ep_size",
    "parallelism": "distributed",
    "activation_checkpoint": "distributed.remat",
    "compile": "distributed.compile",
    "comm.init_timeout_seconds": "distributed.timeout_minutes",
    "comm.train_timeout_seconds": "distributed.timeout_minutes",
    "comm": "distributed.timeout_minutes",
    "checkpoint.enable": "checkpoint.enabled",
    "checkpoint.folder": "checkpoint.checkpoint_dir",
    "checkpoint.interval": "step_scheduler.ckpt_every_steps",
    "checkpoint.keep_latest_k": "checkpoint.max_recent_checkpoints",
    "checkpoint.async_mode": "checkpoint.is_async",
    "checkpoint.load_step": _RESUME,
    "checkpoint.initial_load_path": "checkpoint.restore_from, or weights",
    "checkpoint.last_save_in_hf": "checkpoint.save_consolidated",
    "metrics": _LOGS,
    "profiling": "pipe.profile, in Python",
    "validation": "validation_dataset, and step_scheduler.val_every_steps",
    "float8": "float8 is not supported",
    "quantize": "quantization is not supported",
}

AUTOMODEL: Mapping[str, str] = {
    "recipe": "autofunc finetune llm",
    "checkpoint.model_save_format": _DCP,
    "checkpoint.staging_dir": "not needed: a checkpoint is written beside its folder and then renamed",
    "checkpoint.cpu_offload": "not needed: checkpoints are written from host memory",
    "checkpoint.wait_for_staging": "not needed: a step starts once everything is copied",
    "step_scheduler.grad_acc_steps": _GLOBAL,
    "dist_env.timeout_minutes": "distributed.timeout_minutes",
    "dist_env.backend": "nccl on GPUs and gloo on CPUs; see distributed.device",
    "dist_env": "distributed.device and distributed.timeout_minutes",
    "rng.seed": "seed",
    "rng": "seed",
    "distributed._target_": "distributed.strategy: fsdp2 or ddp",
    "distributed.backend": "nccl on GPUs and gloo on CPUs; see distributed.device",
    "distributed.activation_checkpointing": "distributed.remat: layer",
    "dataloader._target_": "not needed: the loader is built in",
    "dataloader.collate_fn": f"not needed: rows are stacked. {_TEXTS}",
    "dataloader.batch_size": "step_scheduler.local_batch_size",
    "validation_dataloader._target_": "not needed: the loader is built in",
    "validation_dataloader.collate_fn": f"not needed: rows are stacked. {_TEXTS}",
    "packed_sequence": _TEXTS,
    "lr_scheduler.start_wd": _CONSTANT_WD,
    "lr_scheduler.end_wd": _CONSTANT_WD,
    "lr_scheduler.wd_incr_steps": _CONSTANT_WD,
    "lr_scheduler.wd_incr_style": _CONSTANT_WD,
    "lr_scheduler.use_checkpoint_opt_param_scheduler": _NO_STATE,
    "lr_scheduler.override_opt_param_scheduler": _NO_STATE,
    "peft._target_": "not needed: the section has one type",
    "peft.use_dora": "DoRA is not supported; leave it out for LoRA",
    "peft.dropout_position": "not needed: dropout applies to an adapter's input, as in PEFT",
    "peft.lora_A_init": "not needed: A is uniform within 1 / sqrt(inputs), as in PEFT, and B is zero",
    "peft.lora_dtype": "not needed: adapters have the dtype of the weights",
    "peft.use_triton": "distributed.compile",
    "peft.moe_rank_scaling": "not needed: every adapter has rank dim",
    "wandb.save_dir": "wandb.dir",
    "mlflow.description": "mlflow.tags, such as mlflow.note.content",
    "comet": "tensorboard, wandb or mlflow",
    "logger": _LOGS,
    "mfu.peak_tflops": "peak_tflops",
    "mfu.device": "not needed: the GPU's name tells its peak; peak_tflops overrides it",
    "mfu.enabled": "not needed: MFU is shown if the peak is known",
    "restore_from": _RESUME,
    "autopipeline": "distributed.pp_size, schedule and split_points",
    "pipeline": "distributed.pp_size, schedule and split_points",
    "tokenizer": "dataset.tokenizer",
    "quantization": "quantization is not supported",
    "fp8": "float8 is not supported",
    "compile": "distributed.compile",
    "freeze_config": "trainable, patterns of parameters",
    "slurm": "torchrun -m autofunc finetune llm -c FILE",
}

MEGATRON: Mapping[str, str] = {
    "distributed.pipeline_parallel_size": "distributed.pp_size",
    "distributed.pipeline_model_parallel_size": "distributed.pp_size",
    "distributed.tensor_parallel_size": "distributed.tp_size",
    "distributed.tensor_model_parallel_size": "distributed.tp_size",
    "distributed.data_parallel_size": "distributed.dp_size",
    "distributed.context_parallel_size": "distributed.cp_size",
    "distributed.expert_model_parallel_size": "distributed.ep_size",
}

TOOLS: Mapping[str, Mapping[str, str]] = {
    "transformers' Trainer": HF_TRAINER,
    "torchtitan": TORCHTITAN,
    "NeMo AutoModel": AUTOMODEL,
    "Megatron": MEGATRON,
}
"""Tool -> dotted key -> equivalent here. A section stands for all of its keys that are not listed."""


def explained(location: list[str], given: Any) -> list[str]:
    """Explain an unknown key that another tool has, one line per key of a section; empty if no tool has it."""
    return list(_lines(".".join(location), given))


def _lines(path: str, given: Any) -> Iterator[str]:
    inside = any(key.startswith(f"{path}.") for keys in TOOLS.values() for key in keys)
    if inside and isinstance(given, Mapping):
        rest = [name for name, value in given.items() if not list(_lines(f"{path}.{name}", value))]
        for name, value in given.items():
            yield from _lines(f"{path}.{name}", value)
        if not rest:
            return
    tools = [tool for tool, keys in TOOLS.items() if path in keys]
    if tools:
        here = TOOLS[tools[0]][path]
        yield f"unknown key {path!r}, of {' and '.join(tools)}; here: {here}"
