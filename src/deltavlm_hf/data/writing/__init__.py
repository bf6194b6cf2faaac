"""Open questions and dialogues about pairs, written by a chat model behind any OpenAI-compatible endpoint."""

from ...extras import missing

try:
    import openai  # noqa: F401
    import pydantic  # noqa: F401
except ImportError as error:
    raise missing("Writing with a chat model needs more packages", "llm") from error

from .prompts import WRITTEN_TASKS, Settings, describe, read_answer
from .run import Summary, write_dataset

__all__ = ["WRITTEN_TASKS", "Settings", "Summary", "describe", "read_answer", "write_dataset"]
