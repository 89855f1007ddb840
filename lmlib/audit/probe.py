"""Call a copy of any model: from ids (B rows, T positions) to logits (B, T, V vocabulary)."""

import copy
import inspect
import random
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmlib.audit.report import one_line
from lmlib.errors import UserError

Arguments = Callable[[Tensor], dict[str, Any]]  # ids (B, T) -> further arguments of forward

WINDOW = 256  # the longest window that is tried unless the caller asks for more
LENGTH_NAMES = ("sequence_length", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len",
                "block_size", "context_length", "seq_len", "max_length")
KNOWN_ARGUMENTS = {  # required arguments of forward that can be made from ids (B, T)
    "attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like,
    "position_ids": lambda ids: torch.ones_like(ids).cumsum(1) - 1, "targets": lambda ids: ids}


class Probe:
    """Call a copy of a model, always in the same way: `probe(ids)` returns logits (B, T, V).

    The model returns logits alone, first in a tuple, or as `.logits`. `vocab_size` (ids are drawn
    below it) and `sequence_length` (the longest window) are what the model says unless given, the
    length at most WINDOW. `arguments` computes from ids what forward needs besides them, by name.
    A model that cannot be called raises ValueError, which says what to pass.
    """
    def __init__(self, model: nn.Module, vocab_size: int | None = None,
                 sequence_length: int | None = None, arguments: Arguments | None = None,
                 dtype: torch.dtype = torch.float32):
        if not isinstance(model, nn.Module):
            raise UserError("The audit needs a torch module from ids (B, T) to logits (B, T, V), "
                            f"not a {type(model).__name__}.")
        for name, size in (("sequence_length", sequence_length), ("vocab_size", vocab_size)):
            if size is not None and size < 2:
                raise UserError(f"{name} is {size}; the audit needs two tokens or more.")
        self.made_from = (model, vocab_size, sequence_length, arguments)
        self.model = model = _copy(model, dtype)
        self.device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self.accepts = inspect.signature(model.forward).parameters
        self.arguments = arguments or (lambda ids: {})
        required = [name for name, parameter in list(self.accepts.items())[1:]  # the first is ids
                    if parameter.default is parameter.empty and "VAR" not in parameter.kind.name]
        self.required = [] if arguments else required
        if unknown := [name for name in self.required if name not in KNOWN_ARGUMENTS]:
            raise UserError(f"{type(model).__name__}.forward needs {', '.join(unknown)} besides "
                            f"ids: pass arguments=lambda ids: {{{unknown[0]!r}: ...}}.")
        padding = getattr(getattr(model, "config", None), "pad_token_id", None)
        self.padding = -1 if padding is None else padding
        self.order = None  # of the dimensions of the logits, once they are known
        self.vocab_size = vocab_size or 2  # ids 0 and 1 are valid in any vocabulary
        self.sequence_length = self._find_length(sequence_length)
        self.vocab_size = vocab_size or self._find_vocab_size()
        if self.vocab_size == 2:
            self.padding = -1  # both ids are needed

    def __call__(self, ids: Tensor, training: bool = False, seed: int = 0,
                 cached: bool = False) -> Tensor:
        """Return the logits (B, T, V) of ids (B, T); whatever is random depends on `seed` alone."""
        self.model.train(training)
        # Running statistics are restored, so that every call starts from the same state.
        saved = [(module._buffers, name, buffer.clone()) for module in self.model.modules()
                 for name, buffer in module._buffers.items() if training and buffer is not None]
        with fixed_rng(self.device, seed):
            logits = self.to_logits(self.forward(ids, use_cache=cached), ids.shape)
        for buffers, name, value in saved:
            buffers[name] = value
        if logits.isnan().any():
            raise UserError(f"The logits of {ids.shape[1]} random tokens are not all finite.")
        return torch.where(logits.isinf(), 0.0, logits)  # -inf rules a token out

    def forward(self, ids: Tensor, use_cache: bool = False, **more: Any) -> Any:
        """Return what the model itself returns for ids."""
        given = {name: KNOWN_ARGUMENTS[name](ids) for name in self.required} | self.arguments(ids)
        if "use_cache" in self.accepts:
            given["use_cache"] = use_cache
        return self.model(ids, **(given | more))

    def to_logits(self, output: Any, shape: torch.Size) -> Tensor:
        """Return the logits (B, T, V) in the model's output for ids of this shape (B, T)."""
        (B, T), logits = shape, getattr(output, "logits", output)
        if isinstance(logits, dict):
            logits = logits.get("logits", logits)
        elif isinstance(logits, tuple | list):
            tensors = (part for part in logits if isinstance(part, Tensor) and part.dim() >= 2)
            logits = next(tensors, logits)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise UserError(f"The model gave a {type(logits).__name__} where logits are needed.")
        if logits.dim() == 2 and len(logits) == B * T:
            return logits.view(B, T, -1)
        orders = ((0, 1, 2), (1, 0, 2), (0, 2, 1)) if logits.dim() == 3 else ()  # models' layouts
        fits = [order for order in orders if logits.permute(order).shape[:2] == (B, T)]
        if not fits:
            raise UserError(f"For ids of shape ({B}, {T}) the model gave {tuple(logits.shape)}; "
                            "logits of every position, (B, T, V), are needed.")
        if len(fits) == 1:  # where sizes coincide, several fit: the layout of earlier calls decides
            self.order = fits[0]
        return logits.permute(self.order if self.order in fits else fits[0])

    @cached_property
    def in_float64(self) -> "Probe":
        """Make a probe of the model in float64, or this one if the model does not run in it."""
        try:
            probe = Probe(*self.made_from, dtype=torch.float64)
            if hasattr(probe.model, "set_experts_implementation"):
                probe.model.set_experts_implementation("eager")  # grouped products lack float64
            return self if probe.problem(probe.sequence_length) else probe
        except Exception:  # a model may raise anything
            return self

    def draw(self, rows: int, length: int, seed: int) -> Tensor:
        """Return random ids (rows, length); odd seeds use 8 tokens, so that they recur."""
        limit = min(self.vocab_size, 8) if seed % 2 else self.vocab_size
        ids = torch.randint(limit, (rows, length), generator=torch.Generator().manual_seed(seed))
        return self._without_padding(ids).to(self.device)

    def others(self, ids: Tensor, seed: int) -> Tensor:
        """Return random ids that differ from `ids` at every position."""
        generator = torch.Generator().manual_seed(seed)
        offset = torch.randint(1, self.vocab_size, ids.shape, generator=generator).to(ids.device)
        changed = self._without_padding((ids + offset) % self.vocab_size)
        following = self._without_padding((ids + 1) % self.vocab_size)
        return torch.where(changed == ids, following, changed)

    def _without_padding(self, ids: Tensor) -> Tensor:  # models may mask padding
        return torch.where(ids == self.padding, (self.padding + 1) % self.vocab_size, ids)

    def problem(self, length: int) -> str | None:
        """Return why the model does not run on a window of this length; None if it does."""
        try:
            with torch.no_grad():
                self(self.draw(1, length, seed=length))
        except Exception as error:  # a model may raise anything
            if "targets" in self.accepts and "targets" not in self.required:
                self.required.append("targets")  # nanoGPT returns all logits only with a loss
                if not self.problem(length):
                    return None
                self.required.remove("targets")
            return one_line(f"{type(error).__name__}: {error}", 200)
        return None

    def _find_length(self, requested: int | None) -> int:
        """Return the longest window to check: the requested one, or the first that runs."""
        owners = (self.model, getattr(self.model, "config", None))
        said = [getattr(owner, name, None) for owner in owners for name in LENGTH_NAMES]
        said = [min(size, WINDOW) for size in said if isinstance(size, int) and size > 1]
        # What a model does not say, the sizes of its position tables and stored masks may.
        tensors = (*self.model.parameters(), *self.model.buffers())
        sizes = {WINDOW, 64, 16, 4, *(size for tensor in tensors for size in tensor.shape)}
        guesses = sorted((size for size in sizes if 1 < size <= WINDOW), reverse=True)
        for length in [requested] if requested else dict.fromkeys([*said, *guesses]):
            if not (problem := self.problem(length)):
                return length
        raise UserError(f"The model does not run on a window of {length} tokens ({problem}). Pass "
                        "another sequence_length, or what its forward needs besides ids: "
                        "arguments=lambda ids: {...}.")

    def _find_vocab_size(self) -> int:
        """Return what the model says, or the smaller of its embedding and the logits' width."""
        config = getattr(self.model, "config", None)
        size = getattr(config, "vocab_size", None) or getattr(self.model, "vocab_size", None)
        if isinstance(size, int) and size > 1:
            return size
        ids, calls = self.draw(1, self.sequence_length, seed=0), []
        with torch.no_grad(), forward_hooks(self.model, lambda *call: calls.append(call[:2])):
            width = self(ids).shape[-1]
        rows = [module.num_embeddings for module, inputs in calls if embeds(module, inputs, ids)]
        self.vocab_size = min([width, *rows])
        if self.vocab_size < 2 or self.problem(self.sequence_length):
            raise UserError("The model does not say its vocabulary size: pass vocab_size=N.")
        return self.vocab_size


@contextmanager
def forward_hooks(model: nn.Module, hook: Callable):
    """Call hook(module, inputs, output) after each forward of each module."""
    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_hook(hook))
        yield


def embeds(module: nn.Module, inputs: tuple, ids: Tensor) -> bool:
    """Check whether a module embeds ids, in any shape."""
    return (isinstance(module, nn.Embedding) and bool(inputs) and isinstance(inputs[0], Tensor)
            and torch.equal(inputs[0].flatten().to(ids.device), ids.flatten()))


@contextmanager
def fixed_rng(device: torch.device, seed: int):
    """Seed the RNGs of torch, numpy and Python, and restore their states afterwards."""
    cuda = [device] if device.type == "cuda" else []
    with ExitStack() as restore, torch.random.fork_rng(cuda):
        restore.callback(random.setstate, random.getstate())
        restore.callback(np.random.set_state, np.random.get_state())
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield


def spread(logits: Tensor) -> Tensor:
    """Return the logits' standard deviation, estimated by their median absolute deviation."""
    # std() would be that of the few tokens that some models rule out by a huge negative logit.
    sample = logits.flatten()[:: max(1, logits.numel() // 100_000)].cpu().double()
    robust = 1.4826 * (sample - sample.median()).abs().median()  # 1.4826: of a normal distribution
    return robust if robust > 0 else logits.cpu().double().std().clamp(min=1e-30)


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a frozen copy in float32 or better, whose all-zero tensors are random."""
    original = list(model.parameters())
    if any(tensor.is_meta for tensor in original):
        raise UserError("The model is on the meta device; load its weights first.")
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise UserError(f"The audit needs a copy, and copying failed ({error}).") from error
    if any(a.numel() and a.data_ptr() == b.data_ptr()
           for a, b in zip(original, model.parameters(), strict=False)):
        raise UserError("The audit needs a copy, and this model's copy shares its tensors.")
    if dtype == torch.float64 or any(x.dtype in (torch.float16, torch.bfloat16) for x in original):
        model.to(dtype)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # layers that start at zero output would hide any leak inside them
        for tensor in model.parameters():
            if tensor.is_floating_point() and tensor.numel() and not tensor.any():
                shape = tensor.shape
                tensor.copy_(torch.randn(shape, generator=generator) * shape[-1] ** -0.5
                             if shape else torch.tensor(0.5))
    return model
