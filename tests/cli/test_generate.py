"""`autofunc generate`: from the configuration of a run, and from a folder of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from autofunc.automodel import hub
from autofunc.data import ByteTokenizer
from tests.cli.here import run_here
from tests.cli.test_finetune import CONFIG

PROMPTS = "--prompt", "the qui", "--prompt", "lazy", "--max-new-tokens", "6"
LATEST = "-c", "cfg.yaml", "--checkpoint.restore_from", "LATEST"

ROWS_WITHOUT = "--dataset", "{_target_: rows.py:rows, path: no, seq_len: 16}", "--validation_dataset", "null"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, with a checkpoint and a folder for transformers."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    text = CONFIG.replace("pp_size: 2, split_points: [h.1]", "engine: eager").replace("max_steps: 6", "max_steps: 3")
    (folder / "cfg.yaml").write_text(text + "checkpoint: {}\nexport: model\n")
    done = run_here(folder, "train", "-c", "cfg.yaml")
    assert done.status == 0, done.err
    return folder


def test_a_run_and_its_folder_generate_the_same(trained: Path) -> None:
    (trained / "prompts.txt").write_text("the qui\n\nlazy\n")
    of_run = run_here(trained, "generate", *LATEST, *PROMPTS)
    assert of_run.status == 0, of_run.err
    first, second = of_run.out.split("\nlazy")
    assert first.startswith("the qui") and len(second) > 1 and "note" not in of_run.err, "nothing but the texts"
    file = "--prompt-file", "prompts.txt", "--max-new-tokens", "6"
    in_folder = run_here(
        trained, "generate", "--model", "runs/cfg/model", "--tokenizer", "bytes", "--pp", "2", "--json", *file
    )
    assert in_folder.status == 0, in_folder.err
    found = json.loads(in_folder.out)
    assert [each["prompt"] for each in found] == ["the qui", "lazy"]
    assert "".join(each["text"] + "\n" for each in found) == of_run.out
    for each in found:
        assert ByteTokenizer().decode([*each["prompt"].encode(), *each["tokens"]]) == each["text"]
    assert not (trained / "runs" / "cfg-2").exists(), "nothing is written"


def test_sampling(trained: Path) -> None:
    how = *LATEST, *PROMPTS, "--temperature", "1.5", "--top-k", "50"
    made = [run_here(trained, "generate", *how, "--seed", seed).out for seed in ("1", "1", "2")]
    assert made[0] == made[1] != made[2]


def test_untrained_weights(trained: Path) -> None:
    done = run_here(trained, "generate", "-c", "cfg.yaml", *PROMPTS)
    assert done.status == 0 and "using the initial weights" in done.err and "note" not in done.out


def test_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes are refused before anything starts, in one line."""
    monkeypatch.setattr(hub, "_cached", list)
    shutil.copytree(trained / "runs" / "cfg" / "model", trained / "unlike", dirs_exist_ok=True)
    (trained / "rows.py").write_text("import torch\ndef rows(path, seq_len):\n    x = torch.arange(17)\n"
                                     "    return [{'input_ids': x[:-1], 'labels': x[1:]}] * 16\n")  # fmt: skip
    folder = "--model", "unlike"
    cases = [
        (PROMPTS, "either -c FILE"),
        ((*LATEST, *folder, *PROMPTS), "either -c FILE"),
        (LATEST, "needs a prompt: --prompt"),
        ((*LATEST, "--prompt-file", "nowhere.txt"), "nowhere.txt cannot be read"),
        ((*LATEST, "--prompt", ""), "has no tokens"),
        ((*LATEST, *PROMPTS, "--max-new-tokens", "60"), "positions for 16 tokens"),
        ((*LATEST, *PROMPTS, "--top-p", "2"), "top_p=2.0"),
        ((*LATEST, *PROMPTS, "--tokenizer", "nowhere"), "--tokenizer: tokenizer 'nowhere' cannot be loaded"),
        ((*folder, *PROMPTS), "unlike has no tokenizer. Give --tokenizer FOLDER"),
        (("--model", "nowhere/at/all", *PROMPTS), "; no model is cached"),
        ((*folder, *PROMPTS, "--step_scheduler.max_steps", "2"), "takes no configuration keys"),
        (("-c", "cfg.yaml", *ROWS_WITHOUT, *PROMPTS),
         "has no attribute tokenizer: give --tokenizer"),
    ]  # fmt: skip
    for words, said in cases:
        done = run_here(trained, "generate", *words)
        assert done.status == 2 and said in done.err.replace("\n", " ") and not done.out, (words, done)
        assert "Traceback" not in done.err and ".. " not in done.err
