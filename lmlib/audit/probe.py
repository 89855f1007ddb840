"""How the audit calls a model: any module from token ids to logits, as a copy that the checks may change.

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

WINDOW = 256  # tokens of the longest window that is tried where the caller names none


ASKED_FOR = {  # what a forward may insist on beside the ids, made from ids (B, T)
    "attention_mask": torch.ones_like,
    "token_type_ids": torch.zeros_like,
    "position_ids": lambda ids: torch.arange(ids.shape[1], device=ids.device).expand_as(ids),
    "targets": lambda ids: ids,  # some give the logits of every position only beside a loss
}


class Probe:
    """A copy of a model in float32 or better: `probe(ids)` takes ids (B, T) to logits (B, T, V), in the same way at each call.

    In the copy, tensors of zeros hold random numbers: a layer that begins as nothing (its output matrix is zero) could hide
    anything. Chance (dropout, a random router) is the same at each call of one `seed`.

    Args:
        model: any module from ids to logits, alone, first in a tuple, or as `.logits`.
        vocab_size: ids below it are drawn; None asks the model.
        sequence_length: the longest window; None asks the model, and takes at most WINDOW.
        arguments: what to pass to forward beside the ids, by name, made from the ids.

    Raises:
        ValueError: the model cannot be called so; the sentence says what is needed.
    """

    def __init__(
        self,
        model: nn.Module,
        vocab_size: int | None = None,
        sequence_length: int | None = None,
        arguments: Callable[[Tensor], dict[str, Any]] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(f"The audit needs a torch module from ids (B, T) to logits (B, T, V), not a {type(model).__name__}.")
        self.made_of = (model, vocab_size, sequence_length, arguments)
        self.model = model = _copy(model, dtype)
        self.device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self.accepts = inspect.signature(model.forward).parameters
        self.arguments = arguments or (lambda ids: {})
        self.asked_for = [] if arguments else _asked_for(model, self.accepts)
        if sequence_length is not None and sequence_length < 2:
            raise ValueError(f"sequence_length is {sequence_length}; an order in time needs two tokens or more.")
        if vocab_size is not None and vocab_size < 2:
            raise ValueError(f"vocab_size is {vocab_size}; two tokens or more are needed to change one for another.")
        self.padding = getattr(getattr(model, "config", None), "pad_token_id", None)
        self.vocab_size, self.order = vocab_size or 2, None
        self.sequence_length = self._longest(sequence_length)
        self.vocab_size = vocab_size or self._vocabulary()
        self.padding = None if self.vocab_size <= 2 else self.padding

    def __call__(self, ids: Tensor, training: bool = False, seed: int = 0, cached: bool = False) -> Tensor:
        """Logits (B, T, V) of ids (B, T), in evaluation or training mode; `cached`: while a cache is filled."""
        self.model.train(training)
        homes = [(m._buffers, name) for m in self.model.modules() for name, buffer in m._buffers.items() if buffer is not None]
        before = [home[name].clone() for home, name in homes] if training else []
        with fixed_rng(self.device, seed):
            logits = _logits(self.forward(ids, use_cache=cached), ids.shape, self)
        for (home, name), value in zip(homes, before, strict=False):  # running statistics: each call begins as the first did
            home[name] = value
        if logits.isnan().any():
            raise ValueError(f"The model's logits of a window of {ids.shape[1]} random tokens are not all finite: some are NaN.")
        return torch.where(logits.isinf(), 0.0, logits)  # tokens that are ruled out

    def forward(self, ids: Tensor, use_cache: bool = False, **more: Any) -> Any:
        """What the model itself gives for ids."""
        given = {name: ASKED_FOR[name](ids) for name in self.asked_for} | self.arguments(ids)
        if "use_cache" in self.accepts:
            given["use_cache"] = use_cache
        return self.model(ids, **(given | more))

    def in_float64(self) -> "Probe | None":
        """The same model in float64, where rounding cannot pass for a leak; None if it does not compute in it."""
        try:
            probe = Probe(*self.made_of, dtype=torch.float64)
            if hasattr(probe.model, "set_experts_implementation"):
                probe.model.set_experts_implementation("eager")  # grouped products have no float64
            return None if probe.runs(probe.sequence_length) else probe
        except Exception:  # whatever a stranger's code raises
            return None

    def draw(self, rows: int, length: int, seed: int) -> Tensor:
        """Random ids (rows, length), padding left out; an odd seed draws from few, so that tokens come again."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(min(self.vocab_size, 8) if seed % 2 else self.vocab_size, (rows, length), generator=generator)
        return self._without_padding(ids).to(self.device)

    def others(self, ids: Tensor, seed: int) -> Tensor:
        """Ids that differ from these at each place."""
        generator = torch.Generator().manual_seed(seed)
        away = torch.randint(1, self.vocab_size, ids.shape, generator=generator).to(ids.device)
        changed = self._without_padding((ids + away) % self.vocab_size)
        return torch.where(changed == ids, self._without_padding((ids + 1) % self.vocab_size), changed)

    def _without_padding(self, ids: Tensor) -> Tensor:
        return ids if self.padding is None else torch.where(ids == self.padding, (self.padding + 1) % self.vocab_size, ids)

    def runs(self, length: int) -> str | None:
        """Why the model cannot read a window of this length; None if it can."""
        problem = self._problem(length)
        if problem and "targets" in self.accepts and "targets" not in self.asked_for:
            self.asked_for.append("targets")
            if self._problem(length):
                self.asked_for.remove("targets")
            else:
                problem = None
        return problem

    def _problem(self, length: int) -> str | None:
        try:
            with torch.no_grad():
                self(self.draw(1, length, seed=length))
        except Exception as error:  # whatever a stranger's code raises
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return None

    def _longest(self, asked: int | None) -> int:
        """The longest window to try: the one asked for, or what the model or the sizes of its tensors say, if it runs."""
        if asked is not None:
            if problem := self.runs(asked):
                raise ValueError(f"The model does not run on a window of {asked} tokens ({problem}).")
            return asked
        names = ("sequence_length", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "block_size")
        homes = (self.model, getattr(self.model, "config", None))
        said = [getattr(home, name, None) for home in homes for name in (*names, "context_length", "seq_len", "max_length")]
        said = [size for size in said if isinstance(size, int) and size > 1]
        sizes = {size for tensor in (*self.model.parameters(), *self.model.buffers()) for size in tensor.shape}
        guesses = sorted((size for size in {WINDOW, 64, 16, 4, *sizes} if 1 < size <= WINDOW), reverse=True)
        problem = ""
        for length in dict.fromkeys([*(min(size, WINDOW) for size in said), *guesses]):
            if not (problem := self.runs(length)):
                return length
        raise ValueError(
            f"The model runs on none of the windows that were tried (the last: {problem}). Name one: sequence_length=N; or, if "
            "its forward needs more than ids, pass it: arguments=lambda ids: {...}."
        )

    def _vocabulary(self) -> int:
        """What the model says, the rows of the embedding that the ids go to, or the width of the logits."""
        config = getattr(self.model, "config", None)
        known = getattr(config, "vocab_size", None) or getattr(self.model, "vocab_size", None)
        if isinstance(known, int) and known > 1:
            return known
        ids, read = self.draw(1, self.sequence_length, seed=0), []
        hooks = [
            module.register_forward_pre_hook(
                lambda module, given: read.append(module.num_embeddings) if given and _same(given[0], ids) else None
            )
            for module in self.model.modules()
            if isinstance(module, nn.Embedding)
        ]
        with torch.no_grad():
            width = self(ids).shape[-1]
        for hook in hooks:
            hook.remove()
        self.vocab_size = min([*read, width])
        if self.vocab_size < 2 or self.runs(self.sequence_length):
            raise ValueError("The model's vocabulary is unknown: pass vocab_size.")
        return self.vocab_size

    @property
    def has_cache(self) -> bool:
        return hasattr(self.model, "new_cache") or ("use_cache" in self.accepts and bool(self._cache_name()))

    def _cache_name(self) -> str:
        return next((name for name in ("past_key_values", "cache_params") if name in self.accepts), "")

    def decode(self, ids: Tensor, pieces: list[int]) -> Tensor:
        """Logits (B, T, V) of ids (B, T) read in pieces of these lengths, each from the cache that the earlier ones left."""
        self.model.eval()
        cache, logits, name = None, [], self._cache_name()
        if hasattr(self.model, "new_cache"):
            cache = self.model.new_cache(*ids.shape)
        for piece in ids.split(pieces, dim=1):
            if hasattr(self.model, "new_cache"):
                output = self.model(piece, cache)
            else:
                output = self.forward(piece, use_cache=True, **({name: cache} if cache is not None else {}))
                cache = getattr(output, name, None) if not isinstance(output, tuple) else output[1]
                if cache is None:
                    raise ValueError(f"The model accepts {name} and gives none back.")
            logits.append(_logits(output, piece.shape, self))
        return torch.cat(logits, dim=1)


@contextmanager
def fixed_rng(device: torch.device, seed: int):
    """Chance (torch's, numpy's, Python's) from a seed, and as it was before when done."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def spread(logits: Tensor) -> Tensor:
    """The standard deviation of logits, by their median distance from the median (times 1.4826, as for normal ones), which a
    few that are ruled out by a huge number do not change."""
    some = logits.flatten()[:: max(1, logits.numel() // 100_000)].double()
    robust = 1.4826 * (some - some.median()).abs().median()
    return robust if robust > 0 else logits.double().std().clamp(min=1e-30)


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError("The model has no weights (it is on the meta device): the audit needs it to compute.")
    owned = {tensor.data_ptr() for tensor in model.parameters() if tensor.numel()}
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"The audit works on a copy, and this model cannot be copied ({error}).") from error
    if owned & {tensor.data_ptr() for tensor in model.parameters() if tensor.numel()}:
        raise ValueError("The audit works on a copy, and this model's copy shares its tensors with it.")
    if dtype == torch.float64 or any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in model.parameters()):
        model.to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.requires_grad_(False)
            if tensor.is_floating_point() and tensor.numel() and not tensor.any():
                drawn = torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5 if tensor.dim() else 0.5
                tensor.copy_(torch.as_tensor(drawn))
    return model


def _asked_for(model: nn.Module, accepts: Any) -> list[str]:
    """The names that forward insists on beside its first."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [name for name, p in list(accepts.items())[1:] if p.kind in kinds and p.default is inspect.Parameter.empty]
    if strange := [name for name in needed if name not in ASKED_FOR]:
        raise ValueError(
            f"{type(model).__name__}.forward needs {', '.join(strange)} beside the ids, and what is right for that only its "
            f"author knows: pass it, as in arguments=lambda ids: {{{strange[0]!r}: ...}}."
        )
    return needed


def _logits(output: Any, shape: torch.Size, probe: Probe) -> Tensor:
    """The logits (B, T, V) in whatever a model gave for ids of this shape (B, T)."""
    B, T = shape
    if isinstance(output, dict) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list):
        output = next((part for part in output if isinstance(part, Tensor) and part.dim() >= 2), output)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ValueError(f"The model gave a {type(output).__name__} where logits (B, T, V), a tuple or .logits are needed.")
    if output.dim() == 2 and len(output) == B * T:
        return output.view(B, T, -1)
    orders = ((0, 1, 2), (1, 0, 2), (0, 2, 1))  # of the dimensions, as models have them
    fits = [order for order in orders if output.dim() == 3 and output.permute(order).shape[:2] == (B, T)]
    if len(fits) == 1:  # where sizes are equal by chance, as they were before
        probe.order = fits[0]
    if fits:
        return output.permute(probe.order if probe.order in fits else fits[0])
    raise ValueError(
        f"For ids of shape ({B}, {T}) the model gave {tuple(output.shape)}; logits of every position, (B, T, V), are needed. "
        "Wrap it in a module that returns them."
    )


def _same(given: Any, ids: Tensor) -> bool:
    return isinstance(given, Tensor) and given.shape == ids.shape and torch.equal(given.to(ids.device), ids)
