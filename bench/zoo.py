"""Which architectures of transformers can be pipelined unmodified? A hundred, each tiny, with random weights.

Each is captured, cut into two stages (1F1B) and three (ZB-H1), and run on two microbatches: loss and gradients must equal
the oracle's bit for bit, and the module's own up to 1e-6 of each gradient's largest element, and so must the statistics of
batch normalisation afterwards. Each runs in a separate process. Results are saved in runs/zoo.json, so that parts can be
run one after the other.

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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

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
RIGHT = ("works", "other bits")
PACKAGES = r"[^ (]*site-packages/"


@dataclass
class Result:
    """The outcome for one architecture."""

    verdict: str  # "works", "refused", "other bits" than the oracle's, "WRONG", or "does not run": by itself, or at all
    why: str = ""
    seconds: float = 0.0  # to capture
    notes: tuple[str, ...] = ()
    check: str = ""  # "OK", or the codes that failed
    trace: str = ""


class Found(NamedTuple):
    """Results of a step."""

    loss: torch.Tensor
    grads: Mapping[str, torch.Tensor]
    state: Mapping[str, torch.Tensor]  # buffers afterwards, those that change


def own_backward(module: torch.nn.Module, batch: Mapping[str, Any], entry: Entry, loss: Loss | None) -> Found:
    """Run a step by autograd, one microbatch after the other; the module's buffers are restored."""
    before = {name: leaf.clone() for name, leaf in module.named_buffers()}
    named = {name: leaf for name, leaf in module.named_parameters() if leaf.requires_grad}
    sums = {name: torch.zeros_like(leaf) for name, leaf in named.items()}
    total = torch.zeros(())
    for microbatch in split_batch(batch, MICROBATCHES, batch_dims=entry.batch_dims):
        terms = evaluate(loss, module(**microbatch), microbatch)
        grads = torch.autograd.grad(terms.sum, list(named.values()), allow_unused=True)
        sums = {name: old if new is None else old + new for (name, old), new in zip(sums.items(), grads, strict=True)}
        total = total + terms.sum.detach()
    state = {name: leaf.clone() for name, leaf in module.named_buffers() if not torch.equal(leaf, before[name])}
    for name, leaf in module.named_buffers():
        leaf.data.copy_(before[name])
    return Found(total / MICROBATCHES, {name: grad / MICROBATCHES for name, grad in sums.items()}, state)


def difference(found: Found, own: Found) -> tuple[float, str]:
    """Return the largest difference of loss, gradients and new state from the module's, and where it is."""
    worst, where = abs(float(found.loss - own.loss)) / abs(float(own.loss)), "the loss"
    for what, one, other in (("gradients of", found.grads, own.grads), ("state", found.state, own.state)):
        if one.keys() != other.keys():
            return math.inf, f"{what} {sorted(one.keys() ^ other.keys())[:3]} are missing, or too many"
        for name, leaf in other.items():
            off = float((one[name] - leaf).abs().max() / leaf.abs().max().clamp_min(1e-3))
            if not off <= worst:
                worst, where = off, name
    return worst, where


def same_bits(found: Found, expected: Found) -> bool:
    """Return whether a pipeline's results equal the oracle's."""
    pairs = ((found.grads, expected.grads), (found.state, expected.state))
    same = all(torch.equal(one[path], leaf) for one, other in pairs for path, leaf in other.items())
    return same and torch.equal(found.loss, expected.loss)


def run(entry: Entry) -> Result:
    """Try one architecture."""
    _quiet()
    batch, loss = BATCHES[entry.batch](), _loss(entry)
    try:
        module = build(entry)
        own = own_backward(module, batch, entry, loss)
    except Exception as error:
        return Result("does not run", _first_sentence(error), trace=traceback.format_exc())
    return _piped(module, batch, entry, loss, own)


def checked(entry: Entry) -> str:
    """Run `af.check` on one architecture; return OK, or what fails."""
    _quiet()
    report = af.check(build(entry), BATCHES[entry.batch](), loss=_loss(entry), batch_dims=entry.batch_dims)
    failed = [f"{each.code}: {' '.join(each.message.split())}" for each in report.verdicts if each.status == "fail"]
    return "; ".join(failed) or "OK"


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def _loss(entry: Entry) -> Loss | None:
    return None if entry.own_loss else scalar_of(None)


def _piped(module: torch.nn.Module, batch: Mapping[str, Any], entry: Entry, loss: Loss | None, own: Found) -> Result:
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
    model: Any, batch: Mapping[str, Any], entry: Entry, loss: Loss | None, own: Found, points: int, name: str
) -> tuple[float, str, bool]:
    """Return the largest difference of a pipeline from the module, where, and whether it equals the oracle bit for bit."""
    params, stages = model.init(), af.split(model, points)
    s = af.schedule.build(name, num_ranks=points, num_microbatches=MICROBATCHES)
    pipe = af.pipeline(stages, s, loss=loss, batch_dims=entry.batch_dims)
    steps = (
        af.value_and_grad(pipe, has_state=True),
        af.reference_value_and_grad(stages[0].model, loss, MICROBATCHES, has_state=True, batch_dims=entry.batch_dims),
    )
    found, expected = (_found(step(params, batch, state=model.init_state())) for step in steps)
    return (*difference(found, own), same_bits(found, expected))


def _found(stepped: Any) -> Found:
    (loss, state), grads = stepped
    return Found(loss, tree.flatten(grads), tree.flatten(state))


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def _first_sentence(error: Exception) -> str:
    line = " ".join(str(error).split()).split(";")[0]
    return line if len(line) <= 220 else f"{line[:220]} ..."


def apart(tried: Callable[[Entry], Any], entry: Entry) -> tuple[Any, str]:
    """Run a function in a separate process; return its result, or how the process ended."""
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(there, tried, entry))
    process.start()
    there.close()
    result, ended = None, f"no result after {LONGEST_S} s"
    if here.poll(LONGEST_S):
        try:
            result, ended = here.recv(), ""
        except EOFError:
            process.join()
            ended = f"its process ended with {process.exitcode}"
    process.kill()
    process.join()
    return result, ended


def _send(there: Connection, tried: Callable[[Entry], Any], entry: Entry) -> None:
    there.send(tried(entry))


def table(results: Mapping[str, Result]) -> str:
    """Format the results as a Markdown page."""
    count = sum(result.verdict in RIGHT for result in results.values())
    lines = [
        "# Models of transformers", "",
        f"{count} of {len(results)} architectures of transformers {transformers.__version__} work unchanged. Each model is "
        "tiny, has random weights, and runs in two stages (1F1B) and three (ZB-H1) on two microbatches. Loss and gradients "
        "match the oracle's bit for bit, and those of the module's own backward up to 1e-6 of the largest element.", "",
        "If rounding in fp32 exceeds that, the difference in fp64 must be below 1e-7; the table then shows both. 'Other "
        "bits' marks a pipeline that is as close to the module, but not equal to the oracle bit for bit: values are "
        "contiguous behind a cut, so a kernel may sum in another order.", "",
        "All models run in train mode without dropout, and statistics of batch normalisation are compared too. Phi-MoE and "
        "Gemma 3n run in eval mode: in train mode the former draws random numbers, and the latter writes to its "
        "parameters.", "",
        f"`python bench/zoo.py --write docs/models.md` generates this page. {describe_machine()}.",
    ]  # fmt: skip
    for kind, entries in KINDS.items():
        lines += ["", f"## {kind}", "", "| architecture | class | | seconds to capture |", "|---|---|---|---|"]
        for name, entry in entries.items():
            if name in results:
                result = results[name]
                said = result.verdict + (f": {re.sub(PACKAGES, '', result.why)}" if result.why else "")
                seconds = f"{result.seconds:.1f}" if result.seconds else ""
                lines.append(f"| {name} | `{entry.model}` | {said.replace('|', '/')} | {seconds} |")
    return "\n".join([*lines, *_checks(results)]) + "\n"


def _checks(results: Mapping[str, Result]) -> list[str]:
    """List where the verdict of `af.check` disagrees with the run."""
    said = {name: result for name, result in results.items() if result.check}
    if not said:
        return []
    alarms = {name: each for name, each in said.items() if (each.check == "OK") != (each.verdict in RIGHT)}
    text = f"It ran on {len(said)} of these models. It says OK exactly where the run is right"
    lines = ["", "## Verdicts of `af.check`", "", f"{text}{', except for:' if alarms else '.'}"]
    for name, each in alarms.items():
        lines += [
            *([""] if name == next(iter(alarms)) else []),
            f"- {name} ({each.verdict}): {re.sub(PACKAGES, '', each.check)}",
        ]
    return lines


def chosen(part: str | None, only: str | None) -> list[str]:
    """Return names of architectures: a part of the zoo, such as the second of ten, or the given ones."""
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
    """Run, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", help="of the zoo, such as 2/10")
    parser.add_argument("--only", help="names, with commas between")
    parser.add_argument("--check", action="store_true", help="what af.check says; the rest as it is kept")
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
        known = kept.get(name)
        if known is None or not options.check:
            made, ended = apart(run, ZOO[name])
            known = replace(made or Result("does not run", ended), check="" if known is None else known.check)
        if options.check:
            said, ended = apart(checked, ZOO[name])
            known = replace(known, check=said or ended)
        result = kept[name] = known
        console.print(f"{name}: {result.verdict} {result.why} ({result.seconds:.1f} s) {result.check}", markup=False)
        if options.trace and result.trace:
            console.print(result.trace, markup=False)
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps({each: asdict(known) for each, known in kept.items()}, indent=1))


if __name__ == "__main__":
    main()
