"""Keys of other tools: each is explained, all at once."""

from __future__ import annotations

WRONG: list[tuple[list[str] | str, ...]] = [
    ("per_device_train_batch_size=4", "per_device_train_batch_size", "step_scheduler.local_batch_size"),
    ("gradient_accumulation_steps=4", "gradient_accumulation_steps", "step_scheduler.global_batch_size"),
    ("learning_rate=1e-4", "learning_rate", "optimizer.lr"),
    ("num_train_epochs=3", "num_train_epochs", "step_scheduler.num_epochs"),
    ("bf16=true", "bf16", "distributed.mp_policy.param_dtype"),
    ("fp16=true", "fp16", "loss scaling"),
    ("gradient_checkpointing=true", "gradient_checkpointing", "distributed.remat"),
    ("max_grad_norm=1.0", "max_grad_norm", "clip_grad_norm.max_norm"),
    ("max_steps=10", "max_steps", "step_scheduler.max_steps"),
    ("training.steps=10", "training.steps", "step_scheduler.max_steps"),
    ("training.seq_len=10", "training.seq_len", "dataset.seq_len"),
    ("parallelism.pipeline_parallel_degree=2", "parallelism.pipeline_parallel_degree", "distributed.pp_size"),
    ("activation_checkpoint.mode=full", "activation_checkpoint", "distributed.remat"),
    ("checkpoint.interval=10", "checkpoint.interval", "step_scheduler.ckpt_every_steps"),
    ("checkpoint.model_save_format=safetensors", "checkpoint.model_save_format", "torch.distributed.checkpoint"),
    ("lr_scheduler.start_wd=0.1", "lr_scheduler.start_wd", "weight decay is constant"),
    ("lr_scheduler.override_opt_param_scheduler=true", "lr_scheduler.override_opt_param_scheduler", "the step alone"),
    ("dist_env.timeout_minutes=5", "dist_env.timeout_minutes", "distributed.timeout_minutes"),
    ("rng.seed=5", "rng.seed", "seed"),
    (
        [
            "distributed._target_=nemo_automodel.components.distributed.fsdp2.FSDP2Manager",
            "peft.use_dora=true",
            "wandb.save_dir=x",
        ],
        "distributed._target_",
        "peft.use_dora",
        "wandb.dir",
    ),
    (
        [
            "model._target_=nemo_automodel.components.models.gpt3.build",
            "dataset._target_=nemo_automodel.components.datasets.llm.squad.make_squad_dataset",
            "learning_rate=3",
            "optimizer.rate=3",
            "seed=-1",
        ],
        "model._target_",
        "dataset._target_",
        "learning_rate",
        "unknown key 'optimizer.rate'",
        "seed",
    ),
    (
        ["model.n_layers=3", "dataset.length=4", "optimizer.rate=3"],
        "unknown key 'model.n_layers'",
        "unknown key 'dataset.length'",
        "unknown key 'optimizer.rate'",
    ),
    ("model.name=llama3", "model.name"),
    ("distributed.pipeline_parallel_size=2", "distributed.pipeline_parallel_size", "pp_size"),
    ("distributed.tensor_model_parallel_size=2", "distributed.tensor_model_parallel_size", "tp_size"),
]
