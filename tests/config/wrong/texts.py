"""Files that are not configurations, or contain invalid values."""

from __future__ import annotations

from tests.config.wrong.base import BASE

LONG = "9" * 5000


def _also(lines: str) -> str:
    return f"{BASE}{lines}\n"


def _block(depth: int) -> str:
    return "\n".join(f"{'  ' * level}a:" for level in range(depth))


LAUGHS = "\n".join(
    ["l0: &l0 [x, x, x, x, x, x, x, x, x]"] + [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
)

WRONG: list[tuple[str | bytes, ...]] = [
    ("", "missing section 'model'", "missing section 'dataset'", "missing section 'optimizer'"),
    ("- 1\n", "cfg.yaml", "is not a mapping of sections"),
    ("3\n", "cfg.yaml", "is not a mapping of sections"),
    ("only text\n", "cfg.yaml", "is not a mapping of sections"),
    ("~\n", "not a mapping of sections"),
    ("model: [\n", "cfg.yaml", "cannot be read", "line 2"),
    ("\tmodel: 1\n", "cfg.yaml", "cannot be read", "line 1"),
    ("x" * 100_000 + ": [\n", "cfg.yaml", "cannot be read"),
    ("[training]\nsteps = 10\n\n[optimizer]\nlr = 1e-3\n", "cfg.yaml", "cannot be read", "line 2"),
    (_also("seed: 1\nseed: 2"), "seed", "duplicate"),
    (f"---{BASE}---{BASE}", "cfg.yaml", "cannot be read", "single document"),
    (b"\x7fELF\x02\x01\x01\x00\x00", "cfg.yaml", "line 1"),
    (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "cfg.yaml is not utf-8", "line 1"),
    (_also("output_dir: grün").encode("latin-1"), "cfg.yaml is not utf-8", "line 7", "save it as UTF-8"),
    (b"\xff\xfea", "cfg.yaml is not utf-16", "save it as UTF-8"),
    (BASE.encode("utf-16-le"), "cfg.yaml", "UTF-16", "save it as UTF-8"),
    (BASE.encode("utf-32"), "cfg.yaml", "UTF-32", "save it as UTF-8"),
    ("seed: " + "[" * 500 + "]" * 500, "line 1", "nested"),
    ("seed: " + "{a: " * 500 + "1" + "}" * 500, "line 1", "nested"),
    (_block(500), "nested"),
    ("[" * 100_000, "line 1", "nest"),
    (LAUGHS, "cfg.yaml", "limit of 10000"),
    (_also("seed: &a [*a]"), "line 7", "recursive aliases"),
    (b"# a comment\n" * 200_000, "cfg.yaml", "2,343 KiB", "at most 256 KiB"),
    (_also("seed: !!python/object/apply:os.mkdir [executed]"), "line 7", "!!python/object"),
    (_also("seed: !own 3"), "line 7", "!own"),
    (_also("seed: !!binary AAAA"), "seed", "binary"),
    (_also("seed: !!binary ä"), "line 7", "!!binary"),
    (_also("seed: 2020-01-01"), "seed", "got '2020-01-01'"),
    (_also("seed: 2020-13-45"), "seed", "got '2020-13-45'"),
    (_also("seed: 2020-01-01 10:00:00"), "seed", "got '2020-01-01 10:00:00'"),
    (_also("seed: !!set {a, b}"), "seed", "set"),
    (_also("seed: !!omap [a: 1]"), "seed", "!!omap"),
    (_also("seed: !!int three"), "seed (line 7)", "'three' is not"),
    (_also("seed: !!float three"), "seed (line 7)", "'three' is not"),
    (_also("seed: !!bool three"), "seed (line 7)", "'three' is not"),
    (_also("seed: !!timestamp three"), "line 7", "!!timestamp"),
    (_also("<<: 3"), "cfg.yaml", "cannot be read", "line 7"),
    (_also("? [a, b]\n: 3"), "key is not text", "line 7"),
    (_also("1: 2"), "key", "1", "text"),
    (_also("~: 3"), "key", "text"),
    (_also("true: 3"), "key", "True", "text"),
    (_also("distributed2: {1: 2}"), "distributed2"),
    (_also(f"seed: {LONG}"), "seed", "5000 digits"),
    (_also(f"seed: -{LONG}"), "seed", "5000 digits"),
    (_also(f"seed: 0x{'f' * 5000}"), "seed", "digits"),
    (_also(f"clip_grad_norm: {{max_norm: {LONG}}}"), "clip_grad_norm.max_norm", "5000 digits"),
    (BASE.replace("n_layer: 2", f"n_layer: {LONG}"), "model.n_layer", "5000 digits"),
    (_also("seed: 1e5000"), "seed", "got inf"),
    (_also("seed: ${missing}"), "seed", "missing"),
    (_also("seed: ${seed}"), "seed"),
    (_also("seed: ${oc.env:NOT_THERE}"), "seed", "NOT_THERE"),
    (_also("seed: ${oc.env:WORD}"), "seed", "abc"),
    (_also("seed: ${oc.decode:${oc.env:WORD}}"), "seed", "abc"),
    (_also("seed: ${oc.decode:${oc.env:OPEN}}"), "seed"),
    (_also("seed: ${oc.env:DIGITS}"), "seed", "got '9999"),
    (BASE.replace("n_layer: 2", "n_layer: '${oc.env:WORD}'"), "model.n_layer", "abc"),
    (_also("seed: ${"), "seed", "${"),
    (_also("seed: ${nothing:1}"), "seed", "nothing"),
    (_also("seed: ???"), "seed", "Missing mandatory value"),
    (BASE.replace("path: corpus", "path: '???'"), "dataset.path", "Missing mandatory value"),
    (_also("seed: ${distributed}"), "seed", "pp_size"),
    (_also("output_dir: ${weights}\nweights: ${output_dir}"), "output_dir"),
    (_also('output_dir: "a\\0b"'), "output_dir", "zero"),
    (BASE.replace("path: corpus", 'path: "a\\0b"'), "dataset.path", "zero"),
    (_also("output_dir: a\x07b"), "cfg.yaml", "cannot be read", "line 7"),
    (BASE.replace("{pp_size", "{? [a] : 1, pp_size"), "distributed", "not text"),
    (BASE.replace("vocab_size: 256", "1: 256"), "model", "key", "text"),
]
