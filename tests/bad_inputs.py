"""Seeded kinds of broken input, each with the command it is thrown at and the words its refusal has to name.

:func:`draw` makes input number ``i`` of a campaign from ``(seed, i)`` alone, so that a failure is replayed by its number.
Values on the command line stand here, files that are read in ``bad_inputs_data`` and ``bad_inputs_runs``, places in
``bad_inputs_places``. ``bad_inputs_campaign`` throws and judges.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

# A network of a few thousand numbers, eight steps of 64 random tokens.
BASE = (
    "model=llama", "size=tiny", "size.d_model=16", "size.n_heads=2", "size.n_kv_heads=1", "size.n_layers.llama=1",
    "size.d_ff.llama=16", "vocab_size=300", "seq_len=16", "global_batch_tokens=64", "budget=512", "data=random",
    "data.n_rows=16", "data.n_val_rows=4", "eval=none", "logger=none", "trainer=cpu", "val_points=1", "val_rows=2",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """What inputs are cut from, made once: finished runs, a stopped one, good text, published weights."""

    root: Path
    random_run: Path
    text_run: Path
    stopped_run: Path
    published: Path
    text: str = field(repr=False)

    @property
    def cache(self) -> Path:
        return self.root / "cache"


@dataclass(frozen=True)
class Bad:
    """One broken input.

    Attributes:
        kind: the family that it is counted under.
        what: what is broken, in words.
        command: the entry that it is thrown at (``train`` for flowhn-train, ...).
        argv: the entry's arguments.
        names: the refusal has to hold one of these; empty: any sentence.
        must_refuse: going on would be wrong.
        around: what surrounds the call (a held lock, a full disk).
    """

    kind: str
    what: str
    command: str
    argv: tuple[str, ...]
    names: tuple[str, ...] = ()
    must_refuse: bool = True
    around: Callable[[], AbstractContextManager] = nullcontext


Maker = Callable[[Stage, Path, random.Random], Bad]
KINDS: dict[str, tuple[int, Maker]] = {}  # name -> (its share among the draws, what makes one)


def kind(name: str, share: int) -> Callable[[Maker], Maker]:
    """Register a maker; it gets the stage, an empty folder of its own and a seeded generator."""

    def register(make: Maker) -> Maker:
        KINDS[name] = (share, make)
        return make

    return register


def draw(stage: Stage, seed: int, number: int) -> Bad:
    """Input ``number`` of the campaign ``seed``: the kinds in turn, in proportion to their shares."""
    import bad_inputs_data  # noqa: F401  (registers its kinds)
    import bad_inputs_places  # noqa: F401
    import bad_inputs_runs  # noqa: F401

    turns = [name for name, (share, _) in sorted(KINDS.items()) for _ in range(share)]
    random.Random(0).shuffle(turns)
    name = turns[number % len(turns)]
    place = stage.root / "thrown" / f"{seed}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return KINDS[name][1](stage, place, random.Random(f"{seed}:{number}"))


def train_argv(stage: Stage, place: Path, *more: str, cache: Path | None = None) -> tuple[str, ...]:
    """Arguments of a tiny training in ``place``; ``more`` replaces a word of the same key."""
    words = {word.partition("=")[0]: word for word in BASE}
    words |= {"output_dir": f"output_dir={place / 'out'}", "cache_dir": f"cache_dir={cache or stage.cache}"}
    if "data=files" in more:
        words = {key: word for key, word in words.items() if not key.startswith("data.")}
    extra = []
    for word in more:
        key = word.partition("=")[0]
        if key in words:
            words[key] = word
        else:
            extra.append(word)
    return (*words.values(), *extra)


def _bad_value(
    stage: Stage, place: Path, name: str, word: str, *, must_refuse: bool = True, more_names: Sequence[str] = ()
) -> Bad:
    key = word.partition("=")[0].lstrip("+~")
    names = (key, key.rsplit(".", 1)[-1], *more_names)
    return Bad(name, word, "train", train_argv(stage, place, word), names, must_refuse)


_WHOLE = (
    "seed", "seq_len", "global_batch_tokens", "vocab_size", "micro_batch_size", "val_rows", "val_points",
    "size.d_model", "size.n_heads", "size.n_kv_heads", "size.n_layers.llama", "size.d_ff.llama", "data.n_rows",
    "data.n_val_rows", "trainer.checkpoint.keep", "trainer.checkpoint.every_n_steps", "trainer.log_every",
    "trainer.throughput.window_steps", "trainer.throughput.warmup_steps", "trainer.num_nodes", "data.seed",
)  # fmt: skip
_REAL = (
    "lr", "clip_grad_norm", "optimizer.weight_decay", "optimizer.eps", "schedule.warmup_fraction",
    "schedule.min_lr_ratio", "trainer.checkpoint.seconds", "trainer.throughput.peak_flops", "optimizer.lr",
)  # fmt: skip
_TRUTHS = ("compile", "debug", "trainer.deterministic", "trainer.progress_bar")
_WORDS = ("kernels", "attention", "device", "precision", "trainer.strategy", "cell", "artefact", "output_dir")
_NOT_WHOLE = ("-1", "-999999999999", "1.5", "nan", "inf", "text", "[]", "[1,2]", "{a:1}", "true", "''", "0x10", "1e400")
_NOT_REAL = ("-1", "nan", "inf", "-inf", "much", "[0.1]", "{x:0.1}", "true", "''", "1e-3.0", "1_", "-1e-9")
_NOT_TRUTH = ("maybe", "2", "[]", "{}", "''", "0.5", "tru")


@kind("wrong types and ranges", 12)
def wrong_value(stage: Stage, place: Path, rng: random.Random) -> Bad:
    keys, values = rng.choice(((_WHOLE, _NOT_WHOLE), (_WHOLE, _NOT_WHOLE), (_REAL, _NOT_REAL), (_TRUTHS, _NOT_TRUTH)))
    return _bad_value(stage, place, "wrong types and ranges", f"{rng.choice(keys)}={rng.choice(values)}")


@kind("wrong words", 4)
def wrong_word(stage: Stage, place: Path, rng: random.Random) -> Bad:
    value = rng.choice(("nonsense", "7", "[]", "{a:1}", "''", "' '", "true", "../../x", "a/b\\\\c", "'a\\nb'"))
    word = f"{rng.choice(_WORDS)}={value}"
    return _bad_value(stage, place, "wrong words", word, must_refuse=False)


@kind("huge numbers", 4)
def huge(stage: Stage, place: Path, rng: random.Random) -> Bad:
    key = rng.choice(("size.d_model", "size.d_ff.llama", "vocab_size", "seq_len", "size.n_heads", "global_batch_tokens",
                      "data.n_rows", "optimizer.eps", "lr", "seed", "budget"))  # fmt: skip
    number = {"optimizer.eps": "1e300", "lr": "1e308", "budget": "1e300"}.get(key) or rng.choice(
        (str(10**13), str(2**63), str(10**30))
    )
    return _bad_value(
        stage, place, "huge numbers", f"{key}={number}", must_refuse=False, more_names=("model", "memory")
    )


@kind("unknown keys and groups", 5)
def unknown(stage: Stage, place: Path, rng: random.Random) -> Bad:
    word = rng.choice((
        "sede=1", "modle=llama", "size.d_modl=16", "optimizer.lrr=1", "data.pth=x", "split.ratoi=0.5", "Seed=1",
        "model=lama", "split=facc", "size=tinny", "data=docz", "eval=papr", "trainer=gpux", "fusion=sumx", "ssm=mamba3",
        "model=null", "~seed", "~data", "~model", "trainer.strategy.x=1", "seed.x=1", "data.packing=pad",
        "data.path=/nowhere", "logger=tensorboard", "experiment=nothing", "choices=x", "hydra.run.dir=/tmp/x",
    ))  # fmt: skip
    key = word.partition("=")[0].lstrip("~")
    argv = train_argv(stage, place, word)
    return Bad(
        "unknown keys and groups", word, "train", argv, (key, key.rsplit(".", 1)[-1]), not word.startswith("hydra")
    )


@kind("nested garbage and unicode", 6)
def garbage(stage: Stage, place: Path, rng: random.Random) -> Bad:
    shapes = (
        "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(1, 40))),
        "=" * rng.randrange(1, 9), "seed", "seed=", "=1", "seed==1", "seed=[[[[", "seed={a:{b:{c:[1,", "[]=1", "--", "-x",
        "seed=" + "[" * 300 + "]" * 300, "seed=" + "{a:" * 100 + "1" + "}" * 100, "seed=" + "9" * 5000,
        "séed=1", "seed=１", "seed=∞", "種=1", "model=llama🦙", "cell=\u202ename", "cell='\u0000'", "seed=\x00",
        "size={d_model:16}", "model={}", "model=[]", "model=5", "data={name:random}", "eval=[docs]", "trainer={}",
        "optimizer=[adamw]", "schedule=5", "schedule=null", "schedule=[]", "schedule={}", "optimizer.betas=[0.9]",
        "optimizer.betas=[0.9,nan]", "optimizer.betas=0.9", "optimizer.betas=[2,3]", "eval.tasks=[1,2]",
        "eval.tasks={a:1}", "eval.tasks=[nothing_such]", "size.n_layers=5", "size.d_ff=[1]", "model.blocks=5",
        "model.pattern=[]", "model.pattern=[nothing]", "model.n_layers=[1]", "seed=1,2", "seed=range(1,3)",
        "logger.csv=5", "+logger.x=5", "trainer.checkpoint=7", "trainer.throughput=[]", "choices.model=null",
    )  # fmt: skip
    word = rng.choice(shapes)
    argv = (*train_argv(stage, place), word)
    return Bad("nested garbage and unicode", repr(word[:60]), "train", argv, (), must_refuse=False)


@kind("interpolations", 4)
def interpolation(stage: Stage, place: Path, rng: random.Random) -> Bad:
    key = rng.choice(("seed", "lr", "cell", "output_dir", "data.n_rows", "model.n_layers", "tokens"))
    value = rng.choice(("${nothing}", "${" + key + "}", "${oc.env:NO_SUCH_NAME}", "${oc.eval:1}", "${tokens:x,y}",
                        "${tokens:1}", "${tokens:1,${size}}", "${", "${}", "${${a}}", "${.x}", "${..x}", "${model}",
                        "${oc.decode:'['}",
                        "${oc.create:[1]}", "${oc.dict.keys:size}", "${hydra:runtime.cwd}"))  # fmt: skip
    return Bad("interpolations", f"{key}={value}", "train", train_argv(stage, place, f"{key}={value}"), (), False)


@kind("_target_ injections", 4)
def injection(stage: Stage, place: Path, rng: random.Random) -> Bad:
    target = rng.choice(("os.system", "subprocess.run", "builtins.eval", "torch.load", "torch.hub.load", "nothing.at.all",
                         "flowhn.nothing", "5", "''", "null", "[a]", "flowhn.models.torch.load", "pathlib.Path"))  # fmt: skip
    where = rng.choice(("model", "model.blocks.transformer", "+model.extra", "model.blocks.transformer.mixer"))
    words = [f"{where}={{_target_:{target},_args_:['touch {place / 'owned'}']}}" if where.startswith("+")
             else f"++{where}._target_={target}"]  # fmt: skip
    return Bad("_target_ injections", words[0], "train", train_argv(stage, place, *words), (), must_refuse=False)


@kind("options of generate, eval, bench, reproduce", 10)
def options(stage: Stage, place: Path, rng: random.Random) -> Bad:
    run = str(stage.text_run)
    out, cache = f"output_dir={place / 'out'}", f"cache_dir={stage.cache}"
    command, argv = rng.choice((
        ("generate", (run, "--prompt", "x", "--max-new-tokens", rng.choice(("-1", "0", "x", "1.5", "nan")))),
        ("generate", (run, "--prompt", "x", "--temperature", rng.choice(("-1", "nan", "inf", "hot")))),
        ("generate", (run, "--prompt", "x", "--temperature", "1", "--top-k", rng.choice(("0", "-5", "x")))),
        ("generate", (run, "--prompt", "x", "--temperature", "1", "--top-p", rng.choice(("0", "2", "nan", "-1")))),
        ("generate", (run, "--prompt", "x", "--device", rng.choice(("tpu", "cuda:99", "", "cpu:x", "meta")))),
        ("generate", (run, "--prompt", "x", "--window", rng.choice(("0", "-1", "x")))),
        ("generate", (run,)), ("generate", ()), ("generate", ("--cost",)), ("generate", ("--cost", "--size", "9b")),
        ("generate", ("--cost", "--size", "seed=1")), ("generate", (str(place / "none"), "--prompt", "x")),
        ("generate", (run, "--prompt", "x", "--seed", rng.choice(("-1", "x", str(2**70))), "--temperature", "1")),
        ("eval", (str(place / "none"),)), ("eval", ()), ("eval", (run, "eval=nothing")), ("eval", (run, "--turst")),
        ("eval", (run, "eval=paper", f"eval.data_dir={place / 'none'}", cache)), ("eval", (run, "eval.limit=0")),
        ("eval", (run, "eval=paper", f"eval.data_dir={stage.root / 'good.txt'}", cache)),
        ("eval", (run, "eval=docs", "eval.tasks=[nothing_such]", cache)), ("eval", (str(stage.random_run), cache)),
        ("bench", ("models=[nothing]", out)), ("bench", ("sizes=[9b]", out)), ("bench", ("protocol=fast", out)),
        ("bench", ("batch=many", out)), ("bench", ("seq_len=-4", out)), ("bench", ("overrides=['sede=1']", out)),
        ("bench", ("bench=nothing", out)), ("bench", ("models=5", out)), ("bench", ("batch=0", out)),
        ("bench", ("windows=-1", "sizes=[tiny]", "models=[llama]", out)), ("bench", ("repeat=x", "sizes=[]", out)),
        ("bench", ("cell_timeout_s=soon", "sizes=[tiny]", "models=[llama]", out)), ("bench", ("seq_len=x", out)),
        ("reproduce", ("table9", out)), ("reproduce", ("table1", "models=[lama]", out)), ("reproduce", ("--al",)),
        ("reproduce", ("table1", "seeds=[x]", out)), ("reproduce", ("table1", "seeds=[]", out)),
        ("reproduce", ("table1", "models=[]", out)), ("reproduce", ("table1", "size=9b", out)),
        ("reproduce", ("table1", "split=fac", out)), ("reproduce", ("table1", "budget=lots", out)),
        ("reproduce", ("table1", "seeds=[-1]", out)), ("reproduce", ("table1", "seed=x", out)),
        ("export", ()), ("export", (str(place / "none"), str(place / "out"))), ("export", (run, run)),
        ("export", (run, str(stage.root / "good.txt"))), ("export", (run, str(stage.root / "good.txt" / "x"))),
        ("convert", ("elsewhere",)), ("convert", ()),
    ))  # fmt: skip
    must = "meta" not in argv and str(2**70) not in argv
    return Bad("options of generate, eval, bench, reproduce", f"{command} {' '.join(argv)}", command, argv, (), must)
