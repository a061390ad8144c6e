"""The configuration that all cases change, and the files around it."""

from __future__ import annotations

import json
from pathlib import Path

BASE = """
model: {_target_: stages.gpt2.build_gpt2_model, vocab_size: 256, n_positions: 16, n_embd: 8, n_layer: 2, n_head: 2}
dataset: {_target_: autofunc.data.TextFolder, path: corpus, seq_len: 16, num_samples_limit: 20}
step_scheduler: {global_batch_size: 8, local_batch_size: 2, max_steps: 2}
distributed: {pp_size: 2, split_points: [h.1], schedule: 1f1b, device: cpu}
optimizer: {_target_: torch.optim.AdamW, lr: 1e-2}
"""

MINE = """
import sys

import torch

number = 3


def raises(**options): raise KeyError("inside")
def raises_lines(**options): raise ValueError("\\n".join(f"line {n} of very many" for n in range(10_000)))
def raises_long(**options): raise ValueError("x" * 1_000_000)
def exits(*given, **options): sys.exit(0)
def exits_with_words(**options): sys.exit("usage: something else")
def asserts(**options): assert False
def recursive(**options): return recursive(**options)
def needs(width: int, names: list[str] | None = None): return None
def empty(**options): return []
def pairs(**options): return [(torch.zeros(16, dtype=torch.int64),) * 2] * 9
def loss(outputs, microbatch): return outputs.square().mean()
def bad_loss(outputs, microbatch): raise RuntimeError("no loss today")
def vector_loss(outputs, microbatch): return outputs.mean(0)
def plan(): return {"*.attn.[qkv].*": "shard(0)"}
def bad_plan(): raise OSError("the plan is gone")
def plan_of_numbers(): return {"*.attn.[qkv].*": 0}
def schedule(num_ranks, num_microbatches): raise ZeroDivisionError("no schedule today")
def no_schedule(num_ranks, num_microbatches): return 7
def exits_late(num_ranks, num_microbatches): sys.exit(0)


class Rows:
    def __init__(self, length=20, raises_at=None): self.length, self.raises_at = length, raises_at
    def __len__(self): return self.length
    def __getitem__(self, index):
        if index == self.raises_at: raise EOFError("the file ends")
        row = torch.arange(16) % 7
        return {"input_ids": row, "labels": row.roll(-1)}


class Uneven(Rows):
    def __getitem__(self, index): return {"input_ids": torch.arange(8 + index % 3), "labels": torch.arange(8 + index % 3)}


class Lengthless(Rows):
    def __len__(self): raise RuntimeError("not counted yet")


class Exiting(Rows):
    def __getitem__(self, index): sys.exit(0)


class Slots(torch.optim.SGD):
    def step(self): sys.exit(0)


class Linear(torch.nn.Module):
    def __init__(self): super().__init__(); self.linear = torch.nn.Linear(16, 256)
    def forward(self, input_ids): return self.linear(input_ids.float())


class ExitsInForward(Linear):
    def forward(self, input_ids): sys.exit(0)


class Attends(torch.nn.Module):
    def __init__(self, heads=2):
        super().__init__()
        self.heads, self.table, self.head = heads, torch.nn.Embedding(256, 12), torch.nn.Linear(12, 256)
        self.q, self.k, self.v, self.out = (torch.nn.Linear(12, 12, bias=False) for _ in range(4))

    def mixed(self, x): return x

    def forward(self, input_ids):
        x = self.table(input_ids)
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.mixed(x + self.out(y.transpose(1, 2).flatten(-2))))


class Convolves(Attends):
    def __init__(self): super().__init__(); self.conv = torch.nn.Conv1d(12, 12, 3, padding=1)
    def mixed(self, x): return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Recurs(Attends):
    def __init__(self): super().__init__(); self.lstm = torch.nn.LSTM(12, 12, batch_first=True)
    def mixed(self, x): return self.lstm(x)[0]


class Flips(Attends):
    def mixed(self, x): return x + x.flip(1)
"""

ENVIRONMENT = {"WORD": "abc", "NUMBER": "5", "OPEN": "[[[", "DIGITS": "9" * 5000}
"""Variables that the configurations name."""

FOLDERS = {
    "architectures_number": '{"architectures": 3, "model_type": "gpt2"}',
    "architectures_mapping": '{"architectures": {"GPT2LMHeadModel": 1}}',
    "architectures_of_numbers": '{"architectures": [7]}',
    "model_type_list": '{"model_type": ["gpt2"]}',
    "auto_map_text": '{"architectures": ["Own"], "auto_map": "modeling.Own"}',
    "auto_map_list": '{"architectures": ["Own"], "auto_map": ["modeling.Own"]}',
    "auto_map_of_numbers": '{"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": 3}}',
    "auto_map_of_nulls": '{"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": null}}',
    "sizes_text": '{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": "wide"}',
    "dtype_number": '{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": 16}',
    "no_json": "architectures: [GPT2LMHeadModel]",
    "list": "[1, 2]",
    "deep": "[" * 100_000,
    "empty": "",
}


def with_sections(sections: dict[str, str]) -> str:
    """Return `BASE` with some sections replaced, each in one line."""
    lines = [line for line in BASE.splitlines() if line.partition(":")[0] not in sections]
    return "\n".join([*lines, *(f"{name}: {text}" for name, text in sections.items()), ""])


def write_files(folder: Path) -> None:
    """Write every file that the configurations name."""
    (folder / "corpus").mkdir()
    (folder / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (folder / "mine.py").write_text(MINE)
    (folder / "raises.py").write_text("raise KeyError('at import')\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(0)\n")
    (folder / "no_python.py").write_text("def f(:\n")
    (folder / "binary.py").write_bytes(b"\x80\x81\x00")
    (folder / "weights.safetensors").write_bytes(b"no weights")
    (folder / "table.csv").write_text("0F0,0B0\n")
    (folder / "table.json").write_text(json.dumps({"rows": 3}))
    for name, text in FOLDERS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    (folder / "binary").mkdir()
    (folder / "binary" / "config.json").write_bytes(b"\xff\xfe\x00\x80")
