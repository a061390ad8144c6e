"""Bad input: one clear error each, before any worker starts."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from autofunc.cli import main, train
from autofunc.train import begin
from tests.cli.test_finetune import CONFIG

OWN = """
import torch

value = 1

def number(**options): return 3
def loss(outputs, microbatch): return outputs.square().mean()
def fails(): raise KeyError("inside")
def empty(**options): return []
def pairs(**options): return [(torch.zeros(16, dtype=torch.int64),) * 2] * 9
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cfg.yaml").write_text(CONFIG)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    (tmp_path / "model.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    def no_worker(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(begin, "launch", no_worker)
    monkeypatch.setattr(begin, "run", no_worker)
    monkeypatch.setattr(train, "start_fork_server", lambda *_: nullcontext())
    monkeypatch.setattr(sys, "argv", ["autofunc", *words])
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    with pytest.raises(SystemExit) as stopped:
        main.main()
    code = stopped.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--distributed.split_points", "[h.9]"], "split point 'h.9' names no layer: did you mean h.1 or h.0"),
        (["--distributed.split_points", "[h.1, h.0]"], "'h.0' runs before 'h.1'"),
        (["--distributed.split_points", "[h.0, h.1]"], "pp_size=2 with schedule 1f1b needs 2 stages, but split_points="),
        (["--distributed.pp_size", "3"], "pp_size=3 with schedule 1f1b needs 3 stages"),
        (
            ["distributed.schedule=interleaved_1f1b"],
            "needs 4 stages (or a larger multiple), but split_points=['h.1'] gives 2",
        ),
        (["--distributed.pp_size", "0"], "distributed.pp_size: input should be greater than or equal to 1; got 0"),
        (["--step_scheduler.local_batch_size", "3"], "global_batch_size=8 is not divisible by local_batch_size=3"),
        (["--distributed.schedule", "1f1"], "distributed.schedule: unknown schedule '1f1': did you mean 1f1b?"),
        (["--datset.seq_len", "3"], "unknown key 'datset': did you mean dataset"),
        (["--step_scheduler.max_step", "3"], "unknown key 'step_scheduler.max_step': did you mean max_steps"),
        (["--distributed.cp_size", "2", "--dataset.seq_len", "14"], "14 tokens, which cp=2 ranks cannot cut into 4 equal"),
        (
            ["--distributed.cp_size", "2", "--distributed.tp_size", "2", "--distributed.sequence_parallel", "true"],
            "sequence_parallel on a mesh with cp=2 and tp=2: cp ranks cut tokens already",
        ),
        (["--distributed.cp_method", "rings"], "distributed.cp_method: input should be 'allgather' or 'ring'"),
        (["--distributed.dp_sise", "2"], "unknown key 'distributed.dp_sise': did you mean dp_size"),
        (["--distributed.ep_size", "2"], "has no routed experts whose parameters are known; use 1"),
        (["--distributed.ep_size", "2", "--distributed.strategy", "ddp"], "ep_size=2 with strategy ddp"),
        (["--distributed.ep_size", "2", "--distributed.dp_size", "1"], "ep_size=2 does not divide the 1 ranks that share"),
        (["--distributed.tp_size", "3"], "distributed, with pp_size=2, tp_size=3: tp=3 does not divide n_head=2; sizes"),
        (["--distributed.tp_size", "2", "--model.n_head", "1"], "tp=2 does not divide n_head=1"),
        (
            ["--distributed.tp_size", "2", "--model.vocab_size", "257"],
            "tp=2 does not divide vocab_size=257; sizes that do: 1",
        ),
        (
            ["--distributed.tp_size", "2", "--distributed.sequence_parallel", "true", "--dataset.seq_len", "15"],
            "sequence_parallel cuts sequences into 2 equal parts, and those of dataset have 15 tokens",
        ),
        (
            ["--distributed.tp_size", "2", "distributed.sequence_parallel=true", "--validation_dataset.seq_len", "15"],
            "sequence_parallel cuts sequences into 2 equal parts, and those of validation_dataset have 15 tokens",
        ),
        (
            ["--distributed.tp_plan", "{h.*.atn.q.weight: shard(0)}"],
            "'h.*.atn.q.weight' matches no parameter; did you mean h.*.attn.q.weight",
        ),
        (["--distributed.tp_size", "2", "--distributed.tp_plan", "{ln_f.*: rows}"], "unknown placement 'rows'"),
        (["--distributed.tp_size", "2", "--distributed.tp_plan", "{ln_f.*: shard(1)}"], "shard(1) for 'ln_f.bias'"),
        (
            ["--distributed.dp_size", "2", "--step_scheduler.local_batch_size", "8"],
            "local_batch_size=8 (the rows of one microbatch) times 2 data parallel ranks; the nearest that divides it is 4",
        ),
        (["--distributed.dp_size", "3"], "global_batch_size=8 cannot be shared by 3 data parallel ranks; the nearest"),
        (["--distributed.dp_size", "16"], "global_batch_size=8 cannot be shared by 16 data parallel ranks"),
        (
            ["--distributed.dp_size", "2", "--distributed.dp_replicate_size", "3"],
            "dp_replicate_size=3 does not divide dp_size=2",
        ),
        (
            ["--distributed.dp_size", "4", "--distributed.dp_replicate_size", "2", "--distributed.strategy", "ddp"],
            "dp_replicate_size=2 with strategy ddp, under which all 4 data parallel ranks hold all parameters",
        ),
        (["--distributed.offload_policy", "cpu", "--distributed.strategy", "ddp"], "offload_policy needs strategy: fsdp2"),
        (["--distributed.mp_policy.param_dtype", "float16"], "float16 would need loss scaling, which is not supported"),
        (["--distributed.mp_policy.param_dtyp", "bf16"], "unknown key 'distributed.mp_policy.param_dtyp': did you mean"),
        (["--clip_grad_norm.max_norm", "0"], "clip_grad_norm.max_norm: input should be greater than 0; got 0"),
        (["--clip_grad_norm.max_nor", "1"], "unknown key 'clip_grad_norm.max_nor': did you mean max_norm"),
        (["--nproc-per-node", "3"], "pp_size=2 and tp_size=1 need 2 processes or a multiple, but there are 3"),
        (
            ["--nproc-per-node", "4", "--distributed.dp_size", "1"],
            "pp_size=2, dp_size=1 and tp_size=1 need 2 processes, but there are 4",
        ),
        (
            ["--model.n_layers", "3"],
            "unknown key 'model.n_layers': stages.gpt2.build_gpt2_model has no such argument; did",
        ),
        (["--optimizer.rate", "3"], "unknown key 'optimizer.rate': torch.optim.AdamW has no such argument"),
        (["--optimizer.lr", "-1"], "optimizer: "),
        (["--dataset.path", "nowhere"], "dataset: TextFolder: nowhere is neither a folder nor a file"),
        (
            ["--dataset.seq_len", "17"],
            "the model on a batch of dataset: gpt2: a sequence of 17 tokens is longer than n_positions=16",
        ),
        (
            ["--validation_dataset.seq_len", "17"],
            "the model on a batch of validation_dataset: gpt2: a sequence of 17 tokens is longer",
        ),
        (["--model.vocab_size", "100"], "token ids up to 255, but the model has vocab_size=100"),
        (["--model._target_", "stages.gpt3.build"], "model._target_: 'stages.gpt3.build'"),
        (["--model._target_", "nowhere.build"], "'nowhere.build' cannot be imported: expected a dotted path"),
        (["--model._target_", "stages.gpt2.build_gpt2"], "has no 'build_gpt2'; did you mean build_gpt2_model"),
        (["--model._target_", "missing.py:build"], "model._target_: there is no file 'missing.py'"),
        (["--model._target_", "model.py:value"], "is int, which cannot be called"),
        (["--loss_fn._target_", "model.py:los"], "has no 'los'"),
        (["--seed", "99999999999999999999999"], "seed: "),
        (["--optimizer._target_", "torch.optim.LBFGS"], "LBFGS, lr=0.01) recomputes the loss in each step"),
        (["--dataset.num_samples_limit", "0"], "dataset: TextFolder: num_samples_limit=0, expected at least 1"),
        (["--dataset.num_samples_limit", "4", "--dataloader.drop_last", "true"], "4 rows, fewer than one batch of 8"),
        (
            ["--validation_dataset.num_samples_limit", "3", "--dataloader.drop_last", "true"],
            "validation_dataset: the dataset has 3 rows, fewer than one batch of",
        ),
        (["--dataset._target_", "model.py:pairs"], "dataset: row 0 of the dataset is a tuple; expected a mapping of names"),
        (["--dataset._target_", "model.py:empty"], "dataset has no rows"),
        (["--dataset._target_", "model.py:number"], "int has no length or no rows by index"),
        (["output_dir=a: b"], "override output_dir='a: b' is not YAML"),
        (
            ["distributed.memory_budget=3kX"],
            "distributed.memory_budget: expected a number of bytes, such as 2000000, 512M",
        ),
        (["distributed.memory_budget=true"], "distributed.memory_budget: expected a number of bytes"),
        (["distributed.memory_budget=1MB"], "memory_budget=1000000 needs remat: auto, which chooses"),
        (
            ["distributed.memory_budget=1MB", "distributed.remat=layer"],
            "or schedule: auto, which searches within it; got remat=layer and schedule=1f1b",
        ),
        (
            ["distributed.remat=auto"],
            "distributed: remat=auto needs memory_budget, the most bytes that may be live on a rank",
        ),
        (["distributed.remat=layers"], "distributed.remat: input should be 'layer', 'stage' or 'auto'; got 'layers'"),
        (
            ["distributed.remat=auto", "distributed.memory_budget=3kB"],
            "distributed: memory_budget=3,000 bytes: rank 0 with schedule 1f1b keeps at least",
        ),
        (
            ["distributed.remat=auto", "distributed.memory_budget=1MB", "distributed.engine=eager"],
            'distributed: remat="auto" measures captured stages, so it needs engine="graph"',
        ),
        (
            ["distributed.compile=1"],
            "distributed.compile: input should be a valid boolean or 'graphs' or 'inductor+graphs'; got 1",
        ),
        (
            ["distributed.compile=graphs", "distributed.device=cpu"],
            'distributed.compile: compile="graphs" records CUDA graphs, and the run is on cpu; use compile=True',
        ),
        (
            ["distributed.compile=true", "distributed.engine=eager"],
            'distributed: compile=True compiles captured stages, so it needs engine="graph"',
        ),
        (["distributed.schedule=aut"], "or auto, which searches for a schedule"),
        (
            ["distributed.schedule=auto", "--distributed.split_points", "[h.0, h.1]"],
            "with schedule auto needs a multiple of 2 stages, such as 2 or 4, but split_points=['h.0', 'h.1'] gives 3",
        ),
        (
            ["distributed.schedule=auto", "distributed.memory_budget=3kB"],
            "distributed.memory_budget=3000 is too small for schedule auto: memory_limit=3000 on rank 0: one microb",
        ),
        (
            ["distributed.schedule=auto", "distributed.memory_budget=3kB", "distributed.engine=eager"],
            "with schedule auto counts the bytes of captured stages, so it needs engine: graph; got eager",
        ),
        (["--seed"], "override '--seed' has no value"),
        (["stray"], "override 'stray' has no value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_clear_error(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    code, error = run(monkeypatch, capsys, "finetune", "llm", "-c", "cfg.yaml", *words)
    assert code == 2
    assert error.startswith("error: ") and message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {_target_: 'model.py:number'}", "model.py:number returned int; expected an nn.Module, an af.Model, or"),
        ("model: {_target_: 'model.py:fails'}", "model: model.py:fails failed: KeyError: 'inside'"),
        ("model: {}", "model: needs a _target_"),
        ("model: [", "cannot be read"),
        ("- 1", "is not a mapping of sections"),
        ("", "missing section 'model'"),
    ],
)
def test_unusable_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    rest = "" if text in ("- 1", "") else "\n".join(line for line in CONFIG.splitlines()[9:])
    (folder / "other.yaml").write_text(f"{text}\n{rest}")
    code, error = run(monkeypatch, capsys, "finetune", "llm", "-c", "other.yaml")
    assert code == 2 and message in error


def test_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    code, error = run(monkeypatch, capsys, "finetune", "llm", "-c", "cfg.yaml", "distributed.compile=true")
    assert code == 2 and error.startswith("error: distributed.compile: compile=True needs a C++ compiler")


def test_missing_file(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(monkeypatch, capsys, "finetune", "llm", "-c", "cgf.yaml")
    assert code == 2 and error == "error: there is no file 'cgf.yaml'; found cfg.yaml\n"


def test_unknown_domain(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(monkeypatch, capsys, "finetune", "lm", "-c", "cfg.yaml")
    assert code == 2 and "did you mean llm" in error


def test_all_problems_of_a_file_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, error = run(monkeypatch, capsys, "finetune", "llm", "-c", "cfg.yaml", "--sed", "1", "distributed.pp_sise=2")
    assert "unknown key 'sed': did you mean seed" in error and "unknown key 'distributed.pp_sise'" in error
