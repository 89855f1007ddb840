"""RunConfig: every parameter of a run, flat, frozen and validated as a whole.

The defaults are the quickstart recipe. The parameters cell of train.ipynb repeats the names and
comments of the class; a parameter, its default and its comment have one home: here.
"""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from lmlib.errors import UserError
from lmlib.files import json_sha256, read_json, resolve_path
from lmlib.leaks import LEAKY
from lmlib.parameters import coerce, read_parameters, unknown_name

# The parameters that shape a model and its arithmetic: those of every model, and of one kind alone.
MODEL = ("attention", "feed_forward", "vocab_size", "hidden_size", "num_hidden_layers",
         "num_attention_heads", "attention_bias", "tie_word_embeddings", "rope_theta",
         "causal_mask")
MLA_ONLY = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
            "rope_interleave")
MOE_ONLY = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
MLP_ONLY = ("intermediate_size",)

# What may differ when a run resumes. A change of anything else would make it another run.
MAY_CHANGE = {"total_steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints",
              "max_hours", "score_test", "micro_batch_size", "device", "compile", "output_dir",
              "run_name", "processes", "sharding"}
# Names of text and weights, which may lie elsewhere on another machine. Their content must match.
PATHS = {"corpus", "validation_corpus", "tokenizer", "init_from"}
# What a run of a version without these parameters did.
ABSENT = {"test_fraction": 0.0, "score_test": False, "keep_checkpoints": None, "max_hours": None,
          "decay_ratio": 0.0, "muon_momentum": 0.95, "compile": False, "processes": 1,
          "sharding": "none"}


@dataclass(frozen=True, init=False)
class RunConfig:
    """All parameters of one run: `RunConfig(total_steps=20)` keeps the defaults of the others.

    Raises one ValueError that lists every mistake: unknown names, wrong types, contradictions.
    """
    # fmt: off
    # The run
    run_name: str = "quickstart"      # the run's folder is output_dir/run_name
    output_dir: str = "outputs"       # a relative path starts at the project's root
    seed: int = 0                     # every random choice is a function of (seed, step)
    device: str = "auto"              # "auto", "cpu", "cuda", "cuda:1" or "mps"
    processes: int = 1                # on this machine, one per GPU; see docs/scale.md
    sharding: Literal["none", "full"] = "none"  # full: divide the model among the processes
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPUs that have it
    compile: bool | Literal["auto"] = "auto"  # torch.compile the loss; auto: on CUDA
    deterministic: bool = False       # deterministic algorithms only (CPU runs are exact anyway)

    # Text
    corpus: str = "shakespeare"       # or a .txt/.jsonl/.parquet file, a folder, a dataset id
    corpus_config: str | None = None  # configuration of a Hugging Face dataset
    corpus_split: str = "train"       # split of a Hugging Face dataset
    text_column: str = "text"         # column with the text (.jsonl, .parquet, Hugging Face)
    validation_corpus: str | None = None  # validation text from elsewhere; None: split the corpus
    validation_fraction: float = 0.15  # fraction of documents for validation, by a hash of each
    test_fraction: float = 0.15       # fraction for the test score after the last step; 0: none
    score_test: bool = True           # False in sweeps: a score that chooses is not reported
    validation_windows: int = 128     # windows in every evaluation, always the same ones
    split: Literal["documents", "windows"] = "documents"  # or "windows", which overlap: a leak
    tokenizer: str = "train"          # "train": byte-level BPE; or a folder or Hugging Face id
    vocab_size: int | None = 4096     # embedding rows; None: the size of a pretrained tokenizer
    sequence_length: int = 256        # tokens in a window (the context length)
    max_tokens: int | None = None     # limit on training tokens; None: all of the corpus

    # Model
    hidden_size: int = 192            # width of the residual stream
    num_hidden_layers: int = 3        # decoder layers
    num_attention_heads: int = 4      # attention heads
    intermediate_size: int = 512      # mlp: width of the SwiGLU feed-forward layer
    attention: Literal["mla", "mha"] = "mla"  # "mla": latent (DeepSeek-V3); "mha": plain (Llama)
    feed_forward: Literal["mlp", "moe"] = "mlp"  # "mlp": SwiGLU; "moe": routed experts
    num_experts: int = 4              # moe: routed experts per layer, besides one shared expert
    num_experts_per_tok: int = 2      # moe: routed experts per token
    moe_intermediate_size: int = 168  # moe: width of an expert
    q_lora_rank: int | None = None    # mla: rank of the compressed query; None: not compressed
    kv_lora_rank: int = 96            # mla: rank of the compressed keys and values
    qk_rope_head_dim: int = 32        # mla: rotary dimensions of a head
    qk_nope_head_dim: int = 16        # mla: dimensions of a head without rotary positions
    v_head_dim: int = 48              # mla: value dimensions of a head
    rope_theta: float = 10000.0       # base of the rotary frequencies
    rope_interleave: bool = True      # mla: rotate pairs (x0, x1) rather than halves
    attention_bias: bool = False      # biases where the stock class has them
    tie_word_embeddings: bool = True  # the output head shares the embedding's weights
    causal_mask: bool = True          # False: attention sees the tokens to predict, which is a leak

    # Initialization
    init_from: str | None = None      # a run, checkpoint or Hugging Face folder to start from
    init_step: int | Literal["best"] | None = None  # its checkpoint; "best"; None: the newest
    init_state: Literal["weights", "full"] = "weights"  # full: its step and optimizer state too

    # Training
    total_steps: int = 1000           # optimizer updates
    batch_size: int = 8               # windows per update
    micro_batch_size: int | None = None  # windows per forward pass, to save memory; None: all
    optimizer: Literal["muon", "adamw"] = "muon"  # "muon" (AdamW for non-matrices) or "adamw"
    learning_rate: float = 0.02       # AdamW's peak learning rate
    muon_learning_rate: float = 0.02  # Muon's peak learning rate
    muon_momentum: float = 0.9        # muon: decay of the running mean of gradients
    warmup_ratio: float = 0.05        # fraction of steps in which the rates rise to their peaks
    decay_ratio: float = 0.6          # last fraction, in which they fall to 0; 0: cosine to 10 %
    weight_decay: float = 0.1         # decoupled, on matrices only
    grad_clip: float = 1.0            # limit on the gradient norm; 0: none
    dropout: float = 0.0              # on the embeddings and on each residual branch
    eval_every: int = 100             # steps between evaluations
    checkpoint_every: int = 100       # steps between checkpoints
    keep_checkpoints: int | None = None  # newest to keep, besides the best; None: all
    log_every: int = 10               # steps between log lines
    max_hours: float | None = None    # save and stop before so many hours have passed
    on_nonfinite: Literal["stop", "skip"] = "stop"  # or "skip" an update that is inf or NaN
    allow_leaks: bool = False         # train even if the audit finds a leak, and mark all results
    # fmt: on

    def __init__(self, /, **parameters: Any):
        hints = get_type_hints(type(self))
        mistakes = [unknown_name(name, hints) for name in parameters.keys() - hints.keys()]
        for f in fields(self):
            value, problem = coerce(f.name, parameters.get(f.name, f.default), hints[f.name])
            object.__setattr__(self, f.name, value)
            mistakes += [problem] if problem else []
        mistakes = mistakes or _contradictions(self)  # these need every type to be right
        if mistakes:
            raise UserError("\n  - ".join(("Invalid parameters:", *sorted(mistakes))))
        # Resolved once: what a relative path means changes with the folders that exist.
        object.__setattr__(self, "_outputs", resolve_path(self.output_dir).absolute())

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides: Any) -> "RunConfig":
        """Read a recipe (YAML or config.json), with overrides; ValueError if it is invalid."""
        whole = path is not None and Path(path).name == "config.json"  # of a run
        return cls(**{**(ABSENT if whole else {}), **(read_parameters(path) if path else {}),
                      **overrides})

    @classmethod
    def recorded(cls, run_dir: Path) -> "RunConfig | None":
        """Return the configuration of the run in a folder; None if its config.json is unusable."""
        try:
            recorded = read_json(run_dir / "config.json")
            recorded = {name: value for name, value in recorded.items() if name != LEAKY}
            return cls(**{**ABSENT, **recorded}) if recorded else None
        except (ValueError, TypeError, AttributeError):
            return None

    @property
    def run_dir(self) -> Path:
        return self._outputs / self.run_name

    @property
    def has_test(self) -> bool:
        """Whether the corpus has a test split: overlapping windows cannot have one."""
        return self.test_fraction > 0 and self.split == "documents"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def model_parameters(self) -> list[str]:
        """Name the parameters that decide the model's weights and arithmetic."""
        of_kind = MLA_ONLY if self.attention == "mla" else ()
        return [*MODEL, *of_kind, *(MOE_ONLY if self.feed_forward == "moe" else MLP_ONLY)]

    def fixed_parameters(self) -> dict[str, Any]:
        """Return what a run keeps for its whole life: all that it uses and that may not change."""
        ignored = MAY_CHANGE | PATHS | unused_parameters(self.attention, self.feed_forward)
        return {name: value for name, value in self.to_dict().items() if name not in ignored}

    def key(self) -> str:
        """Hash the fixed parameters: the run's identity, wherever its files lie.

        A parameter that a later version adds is left out where it says what was done before, so
        that the key of a run stays what it was.
        """
        own = {name: value for name, value in self.fixed_parameters().items()
               if name not in ABSENT or value != ABSENT[name]}
        return json_sha256(own)


def unused_parameters(attention: str, feed_forward: str) -> set[str]:
    """Name the parameters that a model of this kind ignores."""
    of_attention = MLA_ONLY if attention == "mha" else ()
    return {*of_attention, *(MLP_ONLY if feed_forward == "moe" else MOE_ONLY)}


def _contradictions(c: RunConfig) -> list[str]:
    """List what is wrong with parameters that each have the right type."""
    values, ignored = c.to_dict(), unused_parameters(c.attention, c.feed_forward)
    wrong = []

    def need(holds: bool, sentence: str):
        wrong.extend([] if holds else [sentence])

    def limit(names: str, holds: Any, what: str):
        for name in names.split():
            if name not in ignored and values[name] is not None:
                need(holds(values[name]), f"{name} is {values[name]}; it must be {what}")

    limit("validation_windows vocab_size sequence_length max_tokens hidden_size num_hidden_layers "
          "num_attention_heads intermediate_size moe_intermediate_size q_lora_rank kv_lora_rank "
          "qk_rope_head_dim v_head_dim total_steps batch_size micro_batch_size eval_every "
          "checkpoint_every keep_checkpoints log_every processes", lambda n: n >= 1, "1 or more")
    limit("learning_rate muon_learning_rate rope_theta max_hours", lambda n: n > 0, "above 0")
    limit("weight_decay grad_clip seed qk_nope_head_dim", lambda n: n >= 0, "0 or more")
    limit("seed", lambda n: n < 2**63, "below 2**63")
    limit("dropout warmup_ratio muon_momentum", lambda n: 0 <= n < 1, "at least 0 and below 1")
    limit("decay_ratio", lambda n: 0 <= n <= 1, "at least 0 (a cosine) and at most 1")
    limit("qk_rope_head_dim", lambda n: n % 2 == 0, "even, since rotary positions rotate pairs")
    limit("test_fraction", lambda n: 0 <= n < 1, "at least 0 (no test split) and below 1")
    need(0 < c.validation_fraction < 1 or (c.validation_corpus is not None and not c.has_test),
         f"validation_fraction is {c.validation_fraction}; it must lie between 0 and 1, "
         "or name a validation_corpus and set test_fraction to 0")
    need(c.validation_fraction + c.test_fraction < 1 or c.validation_corpus is not None
         or not c.has_test,
         f"validation_fraction {c.validation_fraction} and test_fraction {c.test_fraction} leave "
         "no training text; their sum must be below 1")
    need(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", c.run_name) is not None,
         f"run_name is {c.run_name!r}; it names a folder: use letters, digits, '.', '_' and '-'")
    need(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", c.device) is not None,
         f"device is {c.device!r}; choose from 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'")
    need(c.micro_batch_size is None or c.micro_batch_size <= c.batch_size,
         f"micro_batch_size {c.micro_batch_size} is larger than batch_size {c.batch_size}")
    need(c.max_tokens is None or c.max_tokens > c.sequence_length,
         f"max_tokens {c.max_tokens} is less than one window of sequence_length "
         f"{c.sequence_length} and its last target")
    need(c.compile is not True or c.sharding == "none",
         "compile is true and sharding is full; a divided model cannot be compiled here")
    need(c.split == "documents" or c.validation_corpus is None,
         "split is windows, which divides one corpus; it cannot be used with a validation_corpus")
    need(c.init_step is None or c.init_from is not None, "init_step is given without init_from")
    need(c.init_state == "weights" or c.init_from is not None,
         "init_state is full without init_from")
    if c.feed_forward == "moe":
        need(2 <= c.num_experts_per_tok <= c.num_experts,
             f"num_experts_per_tok is {c.num_experts_per_tok}; it must be at least 2 (the weight "
             "of a single expert is always 1, so its router would learn nothing) and at most "
             f"num_experts, {c.num_experts}")
    if c.attention == "mha" and c.num_attention_heads >= 1:
        head_dim, rest = divmod(c.hidden_size, c.num_attention_heads)
        need(rest == 0, f"hidden_size {c.hidden_size} is not a multiple of num_attention_heads "
                        f"{c.num_attention_heads}, which mha needs")
        need(head_dim % 2 == 0, f"hidden_size / num_attention_heads = {head_dim} must be even, "
                                "since rotary positions rotate pairs")
    return wrong
