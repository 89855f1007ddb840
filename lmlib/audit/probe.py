"""Call any model from token ids to logits, on a copy that the checks may change.

Shapes: B batch, T positions, V vocabulary.
"""

import copy
import inspect
import random
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmlib.audit.report import one_line

Arguments = Callable[[Tensor], dict[str, Any]]  # ids (B, T) -> further arguments of forward

WINDOW = 256  # the longest window that is tried unless the caller asks for more
LENGTH_NAMES = ("sequence_length", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len",
                "block_size", "context_length", "seq_len", "max_length")

KNOWN_ARGUMENTS = {  # required arguments of forward that can be made from ids (B, T)
    "attention_mask": torch.ones_like,
    "token_type_ids": torch.zeros_like,
    "position_ids": lambda ids: torch.arange(ids.shape[1], device=ids.device).expand_as(ids),
    "targets": lambda ids: ids,
}


class Probe:
    """Call a copy of a model, always in the same way: `probe(ids)` returns logits (B, T, V).

    Args:
        model: any module from ids to logits, returned alone, first in a tuple, or as `.logits`.
        vocab_size: ids are drawn below it. None: what the model says.
        sequence_length: the longest window. None: what the model says, at most WINDOW.
        arguments: what forward needs besides ids, by name, computed from ids.

    Raises:
        ValueError: the model cannot be called; the message says what to pass.
    """

    def __init__(self, model: nn.Module, vocab_size: int | None = None,
                 sequence_length: int | None = None, arguments: Arguments | None = None,
                 dtype: torch.dtype = torch.float32):
        if not isinstance(model, nn.Module):
            raise ValueError("The audit needs a torch module from ids (B, T) to logits (B, T, V), "
                             f"not a {type(model).__name__}.")
        for name, size in (("sequence_length", sequence_length), ("vocab_size", vocab_size)):
            if size is not None and size < 2:
                raise ValueError(f"{name} is {size}; the audit needs two tokens or more.")
        self.made_from = (model, vocab_size, sequence_length, arguments)
        self.model = model = _copy(model, dtype)
        self.device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self.accepts = inspect.signature(model.forward).parameters
        self.arguments = arguments or (lambda ids: {})
        self.required = [] if arguments else _required_arguments(model, self.accepts)
        self.padding = getattr(getattr(model, "config", None), "pad_token_id", None)
        self.order = None  # of the dimensions of the logits, once they are known
        self.vocab_size = vocab_size or 2  # ids 0 and 1 are valid in any vocabulary
        self.sequence_length = self._find_length(sequence_length)
        self.vocab_size = vocab_size or self._find_vocab_size()
        self.padding = None if self.vocab_size <= 2 else self.padding

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
            raise ValueError(f"The logits of {ids.shape[1]} random tokens are not all finite.")
        return torch.where(logits.isinf(), 0.0, logits)  # -inf rules a token out

    def forward(self, ids: Tensor, use_cache: bool = False, **more: Any) -> Any:
        """Return what the model itself returns for ids."""
        given = {name: KNOWN_ARGUMENTS[name](ids) for name in self.required} | self.arguments(ids)
        if "use_cache" in self.accepts:
            given["use_cache"] = use_cache
        return self.model(ids, **(given | more))

    def to_logits(self, output: Any, shape: torch.Size) -> Tensor:
        """Return the logits (B, T, V) in the model's output for ids of this shape (B, T)."""
        (B, T), logits = shape, _logits_in(output)
        if logits.dim() == 2 and len(logits) == B * T:
            return logits.view(B, T, -1)
        orders = ((0, 1, 2), (1, 0, 2), (0, 2, 1)) if logits.dim() == 3 else ()  # models' layouts
        fits = [order for order in orders if logits.permute(order).shape[:2] == (B, T)]
        if not fits:
            raise ValueError(f"For ids of shape ({B}, {T}) the model gave {tuple(logits.shape)}; "
                             "logits of every position, (B, T, V), are needed.")
        if len(fits) == 1:  # where sizes coincide, several fit: the layout of earlier calls decides
            self.order = fits[0]
        return logits.permute(self.order if self.order in fits else fits[0])

    def in_float64(self) -> "Probe | None":
        """Return a probe of the model in float64; None if the model does not run in it."""
        try:
            probe = Probe(*self.made_from, dtype=torch.float64)
            if hasattr(probe.model, "set_experts_implementation"):
                probe.model.set_experts_implementation("eager")  # grouped products lack float64
            return None if probe.problem(probe.sequence_length) else probe
        except Exception:  # a model may raise anything
            return None

    def draw(self, rows: int, length: int, seed: int) -> Tensor:
        """Return random ids (rows, length); odd seeds use 8 tokens, so that they recur."""
        limit = min(self.vocab_size, 8) if seed % 2 else self.vocab_size
        ids = torch.randint(limit, (rows, length), generator=torch.Generator().manual_seed(seed))
        return self._without_padding(ids).to(self.device)

    def others(self, ids: Tensor, seed: int) -> Tensor:
        """Return random ids that differ from `ids` at every position."""
        generator = torch.Generator().manual_seed(seed)
        offset = torch.randint(1, self.vocab_size, ids.shape, generator=generator).to(ids.device)
        changed, following = (self._without_padding((ids + n) % self.vocab_size)
                              for n in (offset, 1))
        return torch.where(changed == ids, following, changed)

    def _without_padding(self, ids: Tensor) -> Tensor:  # models may mask padding
        if self.padding is None:
            return ids
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
        for length in [requested] if requested else _possible_lengths(self.model):
            if not (problem := self.problem(length)):
                return length
        raise ValueError(f"The model does not run on a window of {length} tokens ({problem}). Pass "
                         "another sequence_length, or what its forward needs besides ids: "
                         "arguments=lambda ids: {...}.")

    def _find_vocab_size(self) -> int:
        """Return what the model says, or the smaller of its embedding and the logits' width."""
        config = getattr(self.model, "config", None)
        size = getattr(config, "vocab_size", None) or getattr(self.model, "vocab_size", None)
        if isinstance(size, int) and size > 1:
            return size
        ids, sizes = self.draw(1, self.sequence_length, seed=0), []

        def record_rows(module: nn.Module, inputs: tuple, output: Tensor):
            if receives(inputs, ids):
                sizes.append(module.num_embeddings)

        with torch.no_grad(), forward_hooks(self.model, record_rows, nn.Embedding):
            sizes.append(self(ids).shape[-1])
        self.vocab_size = min(sizes)
        if self.vocab_size < 2 or self.problem(self.sequence_length):
            raise ValueError("The model does not say its vocabulary size: pass vocab_size=N.")
        return self.vocab_size


@contextmanager
def forward_hooks(model: nn.Module, hook: Callable, kind: type = nn.Module):
    """Call hook(module, inputs, output) after each forward of the modules of a kind."""
    handles = [module.register_forward_hook(hook)
               for module in model.modules() if isinstance(module, kind)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def receives(inputs: tuple, ids: Tensor) -> bool:
    """Check whether a module's first input is ids, in any shape."""
    return (bool(inputs) and isinstance(inputs[0], Tensor)
            and torch.equal(inputs[0].flatten().to(ids.device), ids.flatten()))


@contextmanager
def fixed_rng(device: torch.device, seed: int):
    """Seed the RNGs of torch, numpy and Python, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def spread(logits: Tensor) -> Tensor:
    """Return the logits' standard deviation, estimated by their median absolute deviation."""
    # std() would be that of the few tokens that some models rule out by a huge negative logit.
    sample = logits.flatten()[:: max(1, logits.numel() // 100_000)].double()
    robust = 1.4826 * (sample - sample.median()).abs().median()  # 1.4826: of a normal distribution
    return robust if robust > 0 else logits.double().std().clamp(min=1e-30)


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a frozen copy in float32 or better, whose all-zero tensors are random."""
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError("The model is on the meta device; load its weights first.")
    addresses = {tensor.data_ptr() for tensor in model.parameters() if tensor.numel()}
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"The audit needs a copy, and copying failed ({error}).") from error
    if addresses & {tensor.data_ptr() for tensor in model.parameters() if tensor.numel()}:
        raise ValueError("The audit needs a copy, and this model's copy shares its tensors.")
    half = (torch.float16, torch.bfloat16)
    if dtype == torch.float64 or any(tensor.dtype in half for tensor in model.parameters()):
        model.to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # layers that start at zero output would hide any leak inside them
        for tensor in model.parameters():
            tensor.requires_grad_(False)
            if not tensor.is_floating_point() or not tensor.numel() or tensor.any():
                continue
            if tensor.dim():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
            else:
                tensor.fill_(0.5)
    return model


def _required_arguments(model: nn.Module, accepts: Any) -> list[str]:
    """Return the names of the arguments that forward requires besides its first, the ids."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [name for name, p in list(accepts.items())[1:]
                if p.kind not in variadic and p.default is inspect.Parameter.empty]
    if unknown := [name for name in required if name not in KNOWN_ARGUMENTS]:
        raise ValueError(f"{type(model).__name__}.forward needs {', '.join(unknown)} besides ids: "
                         f"pass arguments=lambda ids: {{{unknown[0]!r}: ...}}.")
    return required


def _possible_lengths(model: nn.Module) -> list[int]:
    """Return the lengths that a model says, then those of position tables and stored masks."""
    owners = (model, getattr(model, "config", None))
    said = [getattr(owner, name, None) for owner in owners for name in LENGTH_NAMES]
    said = [min(size, WINDOW) for size in said if isinstance(size, int) and size > 1]
    sizes = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    guesses = sorted((n for n in {WINDOW, 64, 16, 4, *sizes} if 1 < n <= WINDOW), reverse=True)
    return list(dict.fromkeys([*said, *guesses]))


def _logits_in(output: Any) -> Tensor:
    """Return the logits in a model's output."""
    if isinstance(output, dict) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list):
        tensors = (part for part in output if isinstance(part, Tensor) and part.dim() >= 2)
        output = next(tensors, output)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ValueError(f"The model gave a {type(output).__name__} where logits are needed.")
    return output
