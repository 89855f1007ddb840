"""RunConfig: every parameter of a run, flat, frozen and checked whole.

The defaults are the quickstart recipe. The notebook's parameters cell repeats the lines of the class.
"""

import difflib
import re
import types
import unicodedata
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

_REPOSITORY = Path(__file__).resolve().parent.parent
LEAKY = "lmlib_leaky"  # marks what a run shows that leaks and was allowed to: the names of the checks that it failed
LEAKY_NAME = " (LEAKY)"  # stands behind the name of such a run, and so in every table and figure
PROJECT_ROOT = _REPOSITORY if (_REPOSITORY / "pyproject.toml").is_file() else Path.cwd()


@dataclass(frozen=True, init=False)
class RunConfig:
    """All parameters of one run.

    `RunConfig(total_steps=20)` takes any of the names below as keywords; the rest keep their defaults.
    Every mistake (unknown name, wrong type, contradiction) is listed in one ValueError.
    """

    # fmt: off
    # The run
    run_name: str = "quickstart"            # the run's folder is output_dir/run_name
    output_dir: str = "outputs"             # a relative path counts from the project's root
    seed: int = 0                           # all chance is a function of (seed, step)
    device: str = "auto"                    # "auto", "cpu", "cuda" or "cuda:1"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the arithmetic; auto: bfloat16 on CUDA, float32 elsewhere
    deterministic: bool = False             # only algorithms that repeat bit for bit (CPU runs do anyway)

    # Text
    corpus: str = "shakespeare"             # "shakespeare", a .txt/.jsonl/.parquet file or folder, or a Hugging Face dataset
    corpus_config: str | None = None        # configuration of a Hugging Face dataset
    corpus_split: str = "train"             # split of a Hugging Face dataset
    text_column: str = "text"               # column that holds the text (.jsonl, .parquet, Hugging Face)
    validation_corpus: str | None = None    # held-out text from elsewhere; None: split the corpus by content
    validation_fraction: float = 0.1        # share of documents held out, decided by a hash of each document
    validation_windows: int = 128           # windows in every evaluation, always the same ones
    split: Literal["documents", "windows"] = "documents"  # windows: overlapping ones, divided at random; a leak
    tokenizer: str = "train"                # "train": byte-level BPE made here; or a folder or Hugging Face id
    vocab_size: int | None = 4096           # embedding rows; None: the size of a ready-made tokenizer
    sequence_length: int = 256              # tokens in a window
    max_tokens: int | None = None           # limit on the training side; None: all of the corpus

    # Model
    hidden_size: int = 192                  # width of the residual stream
    num_hidden_layers: int = 4              # decoder layers
    num_attention_heads: int = 4            # attention heads
    intermediate_size: int = 512            # width of the SwiGLU feed-forward
    attention: Literal["mla", "mha"] = "mla"  # latent attention (DeepSeek-V3) or plain multi-head (Llama)
    feed_forward: Literal["mlp", "moe"] = "mlp"  # SwiGLU for every token, or experts chosen by a router (DeepSeek-V3, GLM-4.5)
    num_experts: int = 4                    # moe: routed experts in a layer; one shared expert comes on top
    num_experts_per_tok: int = 2            # moe: routed experts that read a token
    moe_intermediate_size: int = 168        # moe: width of an expert; intermediate_size is the mlp's
    q_lora_rank: int | None = None          # mla: width of the compressed query; None: not compressed
    kv_lora_rank: int = 96                  # mla: width of the compressed keys and values
    qk_rope_head_dim: int = 32              # mla: rotated dimensions of a head
    qk_nope_head_dim: int = 16              # mla: unrotated dimensions of a head
    v_head_dim: int = 48                    # mla: dimensions of a head's value
    rope_theta: float = 10000.0             # base of the rotary frequencies
    rope_interleave: bool = True            # mla: rotate neighbours (x0, x1) rather than halves
    attention_bias: bool = False            # biases where the stock class has them
    tie_word_embeddings: bool = True        # the head shares the embedding's weights
    causal_mask: bool = True                # false: attention sees the tokens that are to be predicted; a leak

    # Start from another model
    init_from: str | None = None            # a run, checkpoint or Hugging Face folder whose weights to start from
    init_step: int | None = None            # which checkpoint of that run; None: the newest

    init_state: Literal["weights", "full"] = "weights"  # full: go on from its step, with its optimiser's state

    # Training
    total_steps: int = 700                  # updates to make
    batch_size: int = 8                     # windows in an update
    micro_batch_size: int | None = None     # windows at a time, to save memory; None: the whole batch
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: matrices by Muon, the rest by AdamW
    learning_rate: float = 0.01             # AdamW's peak
    muon_learning_rate: float = 0.02        # Muon's peak
    warmup_ratio: float = 0.05              # share of the steps spent warming up; then cosine down to 10 %
    weight_decay: float = 0.1               # decoupled, on matrices only
    grad_clip: float = 1.0                  # limit on the gradient's norm; 0: none
    dropout: float = 0.0                    # on the embeddings and on what each block adds
    eval_every: int = 50                    # steps between evaluations
    checkpoint_every: int = 100             # steps between checkpoints
    log_every: int = 10                     # steps between lines of the log
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what a loss or gradient that is not finite does
    allow_leaks: bool = False               # train although the audit finds a leak; marks everything that the run shows
    # fmt: on

    def __init__(self, **parameters: Any):
        mistakes = []
        hints = get_type_hints(type(self))
        for name in parameters.keys() - hints.keys():
            mistakes.append(_unknown(name, hints))
        for field in fields(self):
            value, problem = _coerce(field.name, parameters.get(field.name, field.default), hints[field.name])
            object.__setattr__(self, field.name, value)
            if problem:
                mistakes.append(problem)
        mistakes += [] if mistakes else _contradictions(self)  # need every type right to be judged
        if mistakes:
            raise ValueError("These parameters need mending:\n" + "\n".join(f"  - {m}" for m in sorted(mistakes)))

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides: Any) -> "RunConfig":
        """The recipe in a YAML (or config.json) file, with overrides.

        Raises:
            ValueError: the file is missing or no flat mapping of names to plain values, or a parameter is wrong.
        """
        return cls(**{**(read_parameters(path) if path else {}), **overrides})

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any]) -> "RunConfig":
        """The configuration that a notebook's variables describe: `RunConfig.from_notebook(globals())`.

        Strongest first: what papermill injected, what was edited in the parameters cell (differs from the
        default), the file that `recipe` names, the defaults.
        """
        injected, edited = notebook_parameters(namespace)
        recipe = injected.pop("recipe", edited.pop("recipe", None))
        defaults = {field.name: field.default for field in fields(cls)}
        edited = {name: value for name, value in edited.items() if name not in defaults or value != defaults[name]}
        return cls.load(recipe, **{**edited, **injected})

    @property
    def run_dir(self) -> Path:
        return resolve_path(self.output_dir) / self.run_name

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve_path(path: str | Path) -> Path:
    """`path` as it stands if that exists, else counted from the project's root (kernels start in notebooks/)."""
    path = Path(path).expanduser()
    return path if path.is_absolute() or path.exists() else PROJECT_ROOT / path


def shown(path: Path) -> str:
    """`path` as a reader of a notebook or terminal wants it: from the project's root where it lies inside."""
    return str(path.relative_to(PROJECT_ROOT) if path.is_relative_to(PROJECT_ROOT) else path)


def printable(text: str) -> str:
    """Text from a model, corpus or file name, safe for a terminal: what would act on it is shown as its number instead
    (control characters and line separators, escape sequences, half surrogates, marks that turn the writing direction)."""
    hidden = {"Cc", "Cs", "Zl", "Zp"}
    turning = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

    def acts(c: str) -> bool:
        return c not in "\n\t" and (unicodedata.category(c) in hidden or c in turning)

    return "".join(f"\\x{ord(c):02x}" if acts(c) else c for c in text)


# ---------------------------------------------------------------------------------------------------
# Reading parameters


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if repeated := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(problem=f"given twice: {', '.join(sorted(repeated))}")
        return super().construct_mapping(node, deep=deep)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """A parameter file as a dict. Keys must be identifiers and values plain (text, number, true/false, null).

    Raises:
        ValueError: no such file, not YAML, not a flat mapping, or a key or value that could carry code.
    """
    file = resolve_path(path)
    if not file.is_file():
        known = sorted(p.relative_to(PROJECT_ROOT).as_posix() for p in PROJECT_ROOT.glob("params/**/*.yaml"))
        raise ValueError(f"There is no parameter file {path}. The recipes are: {', '.join(known)}.")
    try:
        parameters = yaml.load(file.read_text("utf-8"), _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(parameters, dict):
        raise ValueError(f"{path} must be a flat mapping with a line `name: value` for each parameter.")
    parameters.pop(LEAKY, None)  # the mark in a leaky run's config.json is no parameter
    return check_plain(parameters, str(path))


def check_plain(parameters: dict, source: str) -> dict[str, Any]:
    """`parameters`, if each key is an identifier and each value plain; they may become lines of Python."""
    mistakes = []
    for key, value in parameters.items():
        if not (isinstance(key, str) and key.isascii() and key.isidentifier()):
            mistakes.append(f"{key!r} is not a parameter's name")
        elif type(value) not in (str, int, float, bool, types.NoneType):
            mistakes.append(f"{key} is a {type(value).__name__}; write text, a number, true, false or null")
        elif isinstance(value, str) and not value.isprintable():
            mistakes.append(f"{key} holds control characters or line breaks")
    if mistakes:
        raise ValueError(f"{source} cannot be used:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes))
    return parameters


def parse_overrides(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """`-p NAME VALUE` pairs from a command line, each value read as YAML unless the parameter is text."""
    hints = get_type_hints(RunConfig)
    parameters = {}
    for name, text in pairs:
        is_text = name in hints and str in (hints[name], *get_args(hints[name]))
        try:
            parameters[name] = (None if text.lower() in ("null", "none") else text) if is_text else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            parameters[name] = text
    return check_plain(parameters, "-p")


def notebook_parameters(namespace: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(injected by papermill, assigned in the parameters cell) among a notebook's variables.

    IPython keeps every executed cell in `In`; papermill starts its own with "# Parameters". Where cells are not kept
    (nbval, a plain dict), every public plain value counts as assigned.
    """
    injected, edited = {}, {}
    for cell in namespace.get("In", []):
        names = {name: namespace[name] for name in re.findall(r"^(\w+)\s*=", cell, re.MULTILINE) if name in namespace}
        if cell.lstrip().startswith("# Parameters"):
            injected = names
        elif names.keys() & {"run_name", "output_dir"}:
            edited = names
    if not edited:
        plain = (str, int, float, bool, types.NoneType, list, dict, tuple)
        public = {name: value for name, value in namespace.items() if not name.startswith("_") and name not in ("In", "Out")}
        edited = {name: value for name, value in public.items() if isinstance(value, plain) and name not in injected}
    return injected, edited


def notebook_folder(namespace: dict[str, Any]) -> Path:
    """The folder that a notebook's `output_dir` means, once every injected name is known.

    Parameters of a recipe are welcome too, so that one file serves every notebook.

    Raises:
        ValueError: papermill injected a name that neither the notebook nor RunConfig has.
    """
    injected, own = notebook_parameters(namespace)
    known = get_type_hints(RunConfig).keys() | own.keys()
    if unknown := sorted(injected.keys() - known):
        raise ValueError("These parameters need mending:\n" + "\n".join(f"  - {_unknown(n, known)}" for n in unknown))
    return resolve_path(namespace["output_dir"])


def notebook_run(namespace: dict[str, Any]) -> Path:
    """The run's folder that a notebook's `output_dir` and `run_name` mean; raises as `notebook_folder` does."""
    return notebook_folder(namespace) / namespace["run_name"]


# ---------------------------------------------------------------------------------------------------
# Checking parameters


def _unknown(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"{name} is no parameter" + (f"; did you mean {' or '.join(close)}?" if close else "")


def _coerce(name: str, value: Any, hint: Any) -> tuple[Any, str | None]:
    """(value as `hint`, None), or (value, what is wrong with it). "3e-4" is a number; YAML reads it as text."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return value, None if value in choices else f"{name} is {value!r}; choose from {', '.join(map(repr, choices))}"
    optional = types.NoneType in get_args(hint)
    wanted = get_args(hint)[0] if optional else hint
    if value is None and optional:
        return value, None
    if wanted is str and isinstance(value, Path):
        return str(value), None
    if type(value) is wanted:
        if wanted is float and value != value or value in (float("inf"), float("-inf")):
            return value, f"{name} is {value}; write a finite number"
        if wanted is str and (not value or not value.isprintable()):
            return value, f"{name} is {value!r}; write text on one line"
        return value, None
    if wanted in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
            if wanted is float and abs(number) != float("inf") and number == number or number == int(number):
                return wanted(number), None
        except (ValueError, OverflowError):
            pass
    words = {int: "a whole number", float: "a number", bool: "true or false (True or False in Python)", str: "text"}
    return value, f"{name} is {value!r}; write {words[wanted]}{' or null' if optional else ''}"


def _contradictions(c: RunConfig) -> list[str]:
    """What is wrong with parameters that each have the right type."""
    wrong = []

    def need(holds: bool, sentence: str):
        if not holds:
            wrong.append(sentence)

    at_least_one = [
        *("validation_windows", "vocab_size", "sequence_length", "max_tokens", "hidden_size", "num_hidden_layers"),
        *("num_attention_heads", "intermediate_size", "total_steps", "batch_size", "micro_batch_size"),
        *("eval_every", "checkpoint_every", "log_every"),
    ]
    if c.attention == "mla":
        at_least_one += ["q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim"]
    if c.feed_forward == "moe":
        at_least_one += ["moe_intermediate_size"]
        need(
            2 <= c.num_experts_per_tok <= c.num_experts,
            f"num_experts_per_tok is {c.num_experts_per_tok}; it must be at least 2 (the weight of a single expert is always 1, "
            f"which teaches the router nothing) and at most num_experts, {c.num_experts}",
        )
    for name in at_least_one:
        need(getattr(c, name) is None or getattr(c, name) >= 1, f"{name} is {getattr(c, name)}; it must be 1 or more")
    for name in ("learning_rate", "muon_learning_rate", "rope_theta"):
        need(getattr(c, name) > 0, f"{name} is {getattr(c, name)}; it must be above 0")
    for name in ("weight_decay", "grad_clip", "seed"):
        need(getattr(c, name) >= 0, f"{name} is {getattr(c, name)}; it must be 0 or more")
    need(c.seed < 2**63, f"seed is {c.seed}; it must be below 2**63")
    need(0 <= c.dropout < 1, f"dropout is {c.dropout}; it must be at least 0 and below 1")
    need(
        0 <= c.warmup_ratio < 1,
        f"warmup_ratio is {c.warmup_ratio}: the warmup would be longer than the run; it must be at least 0 and below 1",
    )
    need(
        c.validation_corpus is not None or 0 < c.validation_fraction < 1,
        f"validation_fraction is {c.validation_fraction}; it must lie between 0 and 1, or name a validation_corpus",
    )
    need(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", c.run_name) is not None,
        f"run_name is {c.run_name!r}; it names a folder: use letters, digits, '.', '_' and '-'",
    )
    need(
        re.fullmatch(r"auto|cpu|cuda(:\d+)?", c.device) is not None,
        f"device is {c.device!r}; choose from 'auto', 'cpu', 'cuda' or 'cuda:N'",
    )
    need(
        c.micro_batch_size is None or c.micro_batch_size <= c.batch_size,
        f"micro_batch_size {c.micro_batch_size} is larger than batch_size {c.batch_size}",
    )
    need(
        c.max_tokens is None or c.max_tokens > c.sequence_length,
        f"max_tokens {c.max_tokens} is less than one window of sequence_length {c.sequence_length} and its last target",
    )
    need(
        c.split == "documents" or c.validation_corpus is None,
        "split is windows, which divides one corpus; a validation_corpus is held out by itself",
    )
    need(c.init_step is None or c.init_from is not None, "init_step is given without init_from")
    need(c.init_state == "weights" or c.init_from is not None, "init_state is full without init_from")
    if c.attention == "mha" and c.num_attention_heads >= 1:
        need(
            c.hidden_size % c.num_attention_heads == 0,
            f"hidden_size {c.hidden_size} is not a multiple of num_attention_heads {c.num_attention_heads}, as mha needs",
        )
        need(
            c.hidden_size // c.num_attention_heads % 2 == 0,
            f"the head's width, hidden_size / num_attention_heads = {c.hidden_size // c.num_attention_heads}, "
            "must be even for rotary positions",
        )
    if c.attention == "mla":
        need(c.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim is {c.qk_rope_head_dim}; it must be even to be rotated")
        need(c.qk_nope_head_dim >= 0, f"qk_nope_head_dim is {c.qk_nope_head_dim}; it must be 0 or more")
    return wrong
