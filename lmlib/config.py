"""RunConfig: every parameter of a run, flat, frozen and checked whole.

The defaults are the quickstart recipe. The notebook's parameters cell repeats the lines of the class.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from lmlib.files import read_json, resolve_path
from lmlib.leaks import LEAKY
from lmlib.parameters import coerce, read_parameters, unknown_name


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
            mistakes.append(unknown_name(name, hints))
        for field in fields(self):
            value, problem = coerce(field.name, parameters.get(field.name, field.default), hints[field.name])
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

    @property
    def run_dir(self) -> Path:
        return resolve_path(self.output_dir) / self.run_name

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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


# What may differ when a run is continued; a change of anything else would make another run of it.
MAY_CHANGE = {"total_steps", "log_every", "eval_every", "checkpoint_every", "device", "output_dir"}


ONLY_MLA = {"q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rope_interleave"}


ONLY_MOE = {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}


def run_key(config: RunConfig) -> str:
    """What makes this run itself: a hash of the fixed parameters that differ from their defaults."""
    defaults = RunConfig().to_dict()
    own = {name: value for name, value in fixed(config).items() if value != defaults[name]}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def recorded_key(run_dir: Path) -> str | None:
    """The `run_key` of the run that stands in a folder; None where its config.json does not tell."""
    try:
        recorded = read_json(run_dir / "config.json")
        return run_key(RunConfig(**{n: v for n, v in recorded.items() if n != LEAKY})) if recorded else None
    except (ValueError, TypeError):
        return None


def fixed(config: RunConfig) -> dict[str, Any]:
    """The parameters that a run keeps for life: all that it uses but those that may change."""
    left_out = MAY_CHANGE | unused(config.attention, config.feed_forward)
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def unused(attention: str, feed_forward: str) -> set[str]:
    """The parameters that a model of this kind ignores."""
    return (ONLY_MLA if attention == "mha" else set()) | ({"intermediate_size"} if feed_forward == "moe" else ONLY_MOE)
