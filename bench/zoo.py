"""Which architectures of transformers can be pipelined as they are? A hundred, each tiny, with random weights.

Each is captured, cut into two stages (1F1B) and three (ZB-H1), and run on two microbatches: loss and gradients must be the
oracle's bit for bit, and those of the module's own backward up to 1e-6 of each gradient's largest element. Each runs in a
process of its own. Results are kept in runs/zoo.json, so that parts can be run one after the other.

Run: python bench/zoo.py [--part 2/10] [--only llama,bloom] [--check] [--write docs/models.md]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import math
import multiprocessing
import re
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import describe_machine
from rich.console import Console
from rich.progress import track
from zoo_entry import BATCHES, Entry, build
from zoo_others import ENCODERS, PAIRS, SPEECH, VISION, VISION_AND_LANGUAGE
from zoo_text import TEXT

import autofunc as af
from autofunc import tree
from autofunc.batch import split_batch
from autofunc.losses import Loss, evaluate
from autofunc.whole_module import scalar_of

KINDS: Mapping[str, Mapping[str, Entry]] = {
    "Continue a text": TEXT,
    "Encode a text": ENCODERS,
    "Encoder and decoder": PAIRS,
    "Vision": VISION,
    "Speech": SPEECH,
    "Vision and language": VISION_AND_LANGUAGE,
}
ZOO = {name: entry for entries in KINDS.values() for name, entry in entries.items()}
assert len(ZOO) == 100

LAYOUTS = ((2, "1f1b"), (3, "zb_h1"))
MICROBATCHES, TOLERANCE, ROUNDING, LONGEST_S = 2, 1e-6, 1e-7, 600
KEPT = Path("runs/zoo.json")
PACKAGES = r"[^ (]*site-packages/"


@dataclass
class Result:
    """What came of one architecture."""

    verdict: str  # "works", "refused", "other bits" than the oracle's, "WRONG", or "does not run": by itself, or at all
    why: str = ""
    seconds: float = 0.0  # to capture
    notes: tuple[str, ...] = ()
    check: str = ""  # "OK", or the codes that failed
    trace: str = ""


def own_backward(module: torch.nn.Module, batch: Mapping[str, Any], entry: Entry, loss: Loss | None) -> Any:
    """Loss and gradients by autograd, a microbatch after the other."""
    named = {name: leaf for name, leaf in module.named_parameters() if leaf.requires_grad}
    sums = {name: torch.zeros_like(leaf) for name, leaf in named.items()}
    total = torch.zeros(())
    for microbatch in split_batch(batch, MICROBATCHES, batch_dims=entry.batch_dims):
        terms = evaluate(loss, module(**microbatch), microbatch)
        grads = torch.autograd.grad(terms.sum, list(named.values()), allow_unused=True)
        sums = {name: old if new is None else old + new for (name, old), new in zip(sums.items(), grads, strict=True)}
        total = total + terms.sum.detach()
    return total / MICROBATCHES, {name: grad / MICROBATCHES for name, grad in sums.items()}


def difference(found: Any, own: Any) -> tuple[float, str]:
    """How far loss and gradients are from the module's own, and which of them is farthest."""
    worst, where = abs(float(found[0] - own[0])) / abs(float(own[0])), "the loss"
    grads = tree.flatten(found[1])
    if grads.keys() != own[1].keys():
        return math.inf, f"gradients of {sorted(grads.keys() ^ own[1].keys())[:3]} are missing, or too many"
    for name, grad in own[1].items():
        off = float((grads[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-3))
        if not off <= worst:
            worst, where = off, name
    return worst, where


def same_bits(found: Any, expected: Any) -> bool:
    """Whether a pipeline gave what the oracle gives."""
    one, other = tree.flatten(found[1]), tree.flatten(expected[1])
    return torch.equal(found[0], expected[0]) and all(torch.equal(one[path], leaf) for path, leaf in other.items())


def run(entry: Entry, checks: bool) -> Result:
    """Try one architecture."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    batch = BATCHES[entry.batch]()
    loss = None if entry.own_loss else scalar_of(None)
    try:
        module = build(entry)
        own = own_backward(module, batch, entry, loss)
    except Exception as error:
        return Result("does not run", _first_sentence(error), trace=traceback.format_exc())
    result = _piped(module, batch, entry, loss, own)
    if checks:
        report = af.check(module, batch, loss=loss, batch_dims=entry.batch_dims)
        failed = [f"{each.code}: {each.message}" for each in report.verdicts if each.status == "fail"]
        result.check = "; ".join(failed) or "OK"
    return result


def _piped(module: torch.nn.Module, batch: Mapping[str, Any], entry: Entry, loss: Loss | None, own: Any) -> Result:
    try:
        one = split_batch(batch, MICROBATCHES, batch_dims=entry.batch_dims)[0]
        began = time.perf_counter()
        model = af.from_module(module, one)
        seconds = time.perf_counter() - began
        for points, name in LAYOUTS:
            off, where, is_oracle = _compared(model, batch, entry, loss, own, points, name)
            if not is_oracle:
                verdict = "other bits" if off <= TOLERANCE else "WRONG"
                why = f"{name}: not those of the oracle; off by {off:.1e} from the module's own"
                return Result(verdict, why, seconds, model.notes)
            if not off <= TOLERANCE:
                why = f"{where} is off by {off:.1e} in fp32"
                double = module.double()
                wide = tree.map_leaves(_double, batch)
                exact = _compared(
                    af.from_module(double, tree.map_leaves(_double, one)), wide, entry, loss,
                    own_backward(double, wide, entry, loss), points, name,
                )  # fmt: skip
                verdict = "works" if exact[0] <= ROUNDING else "WRONG"
                return Result(verdict, f"{why}, and by {exact[0]:.1e} in fp64", seconds, model.notes)
    except af.AutofuncError as error:
        return Result("refused", _first_sentence(error), trace=traceback.format_exc())
    except Exception as error:
        return Result("WRONG", f"{type(error).__name__}: {_first_sentence(error)}", trace=traceback.format_exc())
    return Result("works", "", seconds, model.notes)


def _compared(
    model: Any, batch: Mapping[str, Any], entry: Entry, loss: Loss | None, own: Any, points: int, name: str
) -> tuple[float, str, bool]:
    """How far a pipeline is from the module's own, where, and whether it has the bits of the oracle."""
    params, stages = model.init(), af.split(model, points)
    oracle = af.reference_value_and_grad(stages[0].model, loss, MICROBATCHES, batch_dims=entry.batch_dims)
    s = af.schedule.build(name, num_ranks=points, num_microbatches=MICROBATCHES)
    found = af.value_and_grad(af.pipeline(stages, s, loss=loss, batch_dims=entry.batch_dims))(params, batch)
    return (*difference(found, own), same_bits(found, oracle(params, batch)))


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def _first_sentence(error: Exception) -> str:
    line = " ".join(str(error).split()).split(";")[0]
    return line if len(line) <= 220 else f"{line[:220]} ..."


def apart(entry: Entry, checks: bool) -> Result:
    """The same in a process of its own: what kills it, or never ends, is a result."""
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(there, entry, checks))
    process.start()
    there.close()
    result = Result("does not run", f"no result after {LONGEST_S} s")
    if here.poll(LONGEST_S):
        try:
            result = here.recv()
        except EOFError:
            process.join()
            result = Result("does not run", f"its process ended with {process.exitcode}")
    process.kill()
    process.join()
    return result


def _send(there: Connection, entry: Entry, checks: bool) -> None:
    there.send(run(entry, checks))


def table(results: Mapping[str, Result]) -> str:
    """The results as a page of Markdown."""
    count = sum(result.verdict == "works" for result in results.values())
    lines = [
        "# Models of transformers", "",
        f"{count} of {len(results)} architectures of transformers {transformers.__version__} work as they are: tiny, with "
        "random weights, cut into two stages (1F1B) and three (ZB-H1), on two microbatches. Loss and gradients are "
        "those of the oracle bit for bit, and of the module's own backward up to 1e-6 of its largest element.", "",
        "Where rounding in fp32 is more than that, it must be less than 1e-7 in fp64, and the table says both.", "",
        f"`python bench/zoo.py --write docs/models.md` makes this page. {describe_machine()}.",
    ]  # fmt: skip
    for kind, entries in KINDS.items():
        lines += ["", f"## {kind}", "", "| architecture | class | | seconds to capture |", "|---|---|---|---|"]
        for name, entry in entries.items():
            if name in results:
                result = results[name]
                said = result.verdict + (f": {re.sub(PACKAGES, '', result.why)}" if result.why else "")
                seconds = f"{result.seconds:.1f}" if result.seconds else ""
                lines.append(f"| {name} | `{entry.model}` | {said.replace('|', '/')} | {seconds} |")
    return "\n".join(lines) + "\n"


def chosen(part: str | None, only: str | None) -> list[str]:
    """Names of architectures: a part of the zoo, such as the second of ten, or those named."""
    names = list(ZOO)
    if only:
        wanted = [_plain(each) for each in only.split(",")]
        unknown = [each for each in wanted if each not in map(_plain, names)]
        if unknown:
            raise SystemExit(f"no architecture {unknown[0]!r}; expected some of {', '.join(map(_plain, names))}")
        return [name for name in names if _plain(name) in wanted]
    number, _, count = (part or "1/1").partition("/")
    return names[(int(number) - 1) * len(names) // int(count) : int(number) * len(names) // int(count)]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def main() -> None:
    """Run, keep and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", help="of the zoo, such as 2/10")
    parser.add_argument("--only", help="names, with commas between")
    parser.add_argument("--check", action="store_true", help="also what af.check says")
    parser.add_argument("--write", type=Path, help="make a page of the kept results, and run nothing")
    parser.add_argument("--trace", action="store_true", help="print where it went wrong")
    options = parser.parse_args()
    kept = {name: Result(**each) for name, each in json.loads(KEPT.read_text()).items()} if KEPT.exists() else {}
    if options.write:
        options.write.write_text(table({name: kept[name] for name in ZOO if name in kept}))
        return
    console = Console(highlight=False, soft_wrap=True)
    names = chosen(options.part, options.only)
    for name in track(names, "architectures", console=console, disable=not console.is_terminal):
        result = kept[name] = apart(ZOO[name], options.check)
        console.print(f"{name}: {result.verdict} {result.why} ({result.seconds:.1f} s) {result.check}", markup=False)
        if options.trace and result.trace:
            console.print(result.trace, markup=False)
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps({each: asdict(known) for each, known in kept.items()}, indent=1))


if __name__ == "__main__":
    main()
