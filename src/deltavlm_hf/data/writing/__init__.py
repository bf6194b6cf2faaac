"""Open questions and dialogues about pairs, written by a chat model behind any OpenAI-compatible endpoint."""

try:
    import openai  # noqa: F401
    import pydantic  # noqa: F401
except ImportError as error:
    raise ImportError('Writing with a chat model needs more packages: pip install "deltavlm-hf[llm]"') from error

from .prompts import WRITTEN_TASKS, Settings, describe, read_answer
from .run import Summary, write_dataset

__all__ = ["WRITTEN_TASKS", "Settings", "Summary", "describe", "read_answer", "write_dataset"]
