"""The sample of text after each evaluation."""

from typing import Any

from torch import Tensor

from lmlib.generation.settings import Settings
from lmlib.generation.text import complete, generate_ids
from lmlib.model.transformer import LanguageModel

PROMPTS, PROMPT_TOKENS, SAMPLE_TOKENS = 3, 16, 24


def sample(model: LanguageModel, tokenizer: Any, windows: Tensor) -> dict[str, list[str]]:
    """Continue the beginnings of validation windows greedily: always the same prompts."""
    windows = windows[:: max(1, len(windows) // PROMPTS)][:PROMPTS]  # of several documents
    prompt = min(PROMPT_TOKENS, windows.shape[1] // 2)
    settings = Settings(min(SAMPLE_TOKENS, windows.shape[1] - prompt), temperature=0)
    ids = windows[:, :prompt].tolist()
    texts = [t.text for t in complete(generate_ids(model, tokenizer, ids, settings))]
    return {"prompts": list(map(tokenizer.decode, ids)), "texts": texts}
