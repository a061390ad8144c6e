"""The public transform: stages and a schedule become one function of (params, batch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tensordict import TensorDict
from torch.distributed.device_mesh import DeviceMesh

from autofunc import tree
from autofunc.engine import EngineOptions
from autofunc.errors import AutofuncError, ModelError, some_of
from autofunc.losses import Loss
from autofunc.pipe import Pipeline
from autofunc.row_dims import BatchDims
from autofunc.runtime.pair_groups import Transfers
from autofunc.runtime.plan import Mode
from autofunc.runtime.step import given_aux
from autofunc.schedule import Schedule
from autofunc.shard import Sharding
from autofunc.splitting import Stage


def pipeline(
    stages: Sequence[Stage],
    schedule: Schedule,
    *,
    loss: Loss | None = None,
    mesh: DeviceMesh | None = None,
    engine: str = "graph",
    compile: bool | str = False,
    remat: str | None = None,
    memory_budget: int | None = None,
    batch_dims: BatchDims = None,
    sharding: Sharding | None = None,
    transfers: Transfers | None = None,
    overlap_f_b: bool = True,
) -> Pipeline:
    """Compose stages by a schedule into one pipelined function.

    Args:
        stages: from `af.split`; as many as in the schedule.
        schedule: from `autofunc.schedule`, in compute form.
        loss: `loss(outputs, microbatch)`, see `autofunc.losses`; None uses the output's own `loss`.
        mesh: from `af.make_mesh`; None runs every pp rank in this process. Ranks with the same dp coordinate pass the same
            rows, ranks with different ones pass different rows: loss and gradients are those of all rows.
        engine: how stages are differentiated: "graph" captures each once and cuts it into forward, backward, input gradient
            and weight gradient; "eager" runs autograd on it, and accepts layers of functions that cannot be
            captured. Modules were already captured by `af.from_module`: what that refuses, no engine accepts.
        compile: True runs the captured pieces as compiled code: results match to 1e-5, not bit for bit. "graphs" records
            steps on a GPU as CUDA graphs, with the same bits: the host spends no time launching kernels, and the memory
            of a step's peak stays reserved. "inductor+graphs" records compiled pieces.
        remat: what the backward recomputes instead of keeping it: None; "layer", all but what goes from layer to layer;
            "stage", all but what the stage received; "auto", the choice with the shortest step within `memory_budget`,
            which may also move part of W's work into `I`. A microbatch has two forwards at most. The eager engine reruns
            the whole stage in every case.
        memory_budget: for "auto": bytes of values that may be alive on a rank, as `schedule.live_bytes` counts them.
        transfers: how values travel between pp ranks, and share a GPU with its computations, see `af.Transfers`.
        overlap_f_b: interleave pairs that the schedule marks, `(0F4;3B0)OVERLAP_F_B` in "dualpipe_v", if their stages
            exchange values with other processes (experts, tp): one computes while the other waits. The bits are the
            same. With False, the eager engine, `compile` or stages that exchange nothing, they run one after the other.
        sharding: how parameters and work are shared over the axes of the mesh, and in what precision, see `af.Sharding`.
        batch_dims: which dim of a batch entry holds the rows, or None for entries that every microbatch gets whole; a
            single number applies to all entries. Without it, ambiguous batches are refused, see
            `autofunc.row_dims.row_dims`.

    Returns:
        An `af.Pipeline`: `pipe(params, batch)` is the loss, `af.value_and_grad(pipe)(params, batch)` loss and gradients.
        It holds no parameters. Its methods (details in `help(af.Pipeline)`):

        - `init(seed)`, `place(full_params)`: initial parameters, or this process's part of given ones
        - `init_state()`, `place_state(full_state)`: the same for the state that layers keep
        - `gather(params_or_grads)`: the full tree, on every process
        - `forward(params, batch)`: outputs of the last stage, for any number of rows
        - `advance(params, batch, states)`: the same, and the new state of each microbatch
        - `clip(grads, max_norm)`, `global_norm(grads)`: gradients with a bounded norm, and the norm
        - `build(batch)`: builds for such batches before the first call
        - `explain()`: stages, values between them, and the schedule drawn, as text
        - `profile(params, batch)`, `costs(params, batch)`: when every action ran; what stages cost, for the simulator
        - `memory(params, batch)`, `measure_bytes(params, batch)`: bytes that stages keep, predicted; and measured in a step
        - `reserved_bytes()`: of receive slots, which are kept between steps
        - `check_finite(params, batch)`: where a step's values stop being finite
        - `with_loss(loss)`: the same pipeline with another loss
        - `close()`: frees what was built, and closes connections

    Raises:
        ScheduleError: if the schedule is invalid or does not fit the number of stages.
        MeshError: if the mesh does not fit the schedule.
        AutofuncError: for unknown or conflicting options.

    Example:
        stages = af.split(model, ["h.4"])
        s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=8)
        pipe = af.pipeline(stages, s, loss=af.losses.causal_lm)
        params = pipe.init(seed=0)
        loss, grads = af.value_and_grad(pipe)(params, batch)
    """
    options = EngineOptions(engine, compile, remat, memory_budget, overlap_f_b)
    return Pipeline(stages, schedule, loss, mesh, options, batch_dims, sharding or Sharding(), transfers or Transfers())


def value_and_grad(
    pipe: Pipeline, *, has_aux: bool = False, has_state: bool = False
) -> Callable[..., tuple[Any, TensorDict]]:
    """Return a pure function that computes the loss and gradients of a pipeline.

    Args:
        pipe: from `af.pipeline`.
        has_aux: also return the aux of a loss that returns `(sum, weight, aux)`.
        has_state: `f` takes the state of layers, such as the running statistics of batch normalisation, and
            returns it as of the end of the step. It is updated microbatch by microbatch; with data parallel ranks,
            the first one's is returned. Required if a layer keeps state.

    Returns:
        `f(params, batch, key=None, state=None) -> (loss, grads)`, or `((loss, aux), grads)`, `((loss, state), grads)`,
        `((loss, aux, state), grads)`. `loss` is the same 0-dim fp32 tensor on every process; `grads` is a tree of this
        process's trainable parameters; `params` and the given `state` are not changed. `key` is (seed, step): the same key
        gives the same dropout in every layout; without a key there is none.

    Raises:
        AutofuncError: if `pipe` is not an `af.Pipeline`.
        BatchError: from `f`, if the number of microbatches does not divide the rows, or the total weight is 0.
        ModelError: if layers keep state and `has_state` is False; from `f`, if a parameter or state is missing.
        PipelineRunError: from `f`, if an action fails.

    Example:
        step_function = af.value_and_grad(pipe)
        for step, batch in enumerate(loader):
            loss, grads = step_function(params, batch, key=(seed, step))
            params, opt_state = opt.update(grads, opt_state, params)

        state = pipe.init_state()  # of a module with batch normalisation
        (loss, state), grads = af.value_and_grad(pipe, has_state=True)(params, batch, state=state)
    """
    if not isinstance(pipe, Pipeline):
        raise AutofuncError(f"value_and_grad takes a pipeline from af.pipeline, not {type(pipe).__name__}")
    kept = pipe.stages[0].model.state_spec
    if kept and not has_state:
        raise ModelError(
            f"{pipe.stages[0].model.title} keeps state ({some_of(kept)}), which is an argument and a return value: "
            "(loss, state), grads = af.value_and_grad(pipe, has_state=True)(params, batch, state=pipe.init_state()); put "
            "the module into eval mode to freeze it"
        )

    def function(
        params: tree.Nested, batch: Mapping[str, Any], key: Any = None, state: tree.Nested | None = None
    ) -> tuple[Any, TensorDict]:
        result = pipe.run(Mode.GRADS, params, batch, key, state)
        values: list[Any] = [result.loss]
        if has_aux:
            values.append(given_aux(result))
        if has_state:
            values.append(tree.to_tensordict(result.state))
        return (values[0] if len(values) == 1 else tuple(values)), tree.to_tensordict(result.grads)

    return function
