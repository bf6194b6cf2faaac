"""What an answer costs by part, in arithmetic and in weights that are read: computed from sizes, at any size."""

from dataclasses import dataclass

from deltavlm_hf import DeltaVLMConfig


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        name (`str`): which part, how often.
        flops (`float`): floating point operations, two for a multiplication with its addition.
        bytes (`float`): of weights and of cached keys and values that are read from memory, each once for a step.
    """

    name: str
    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time by the roofline: what the slower of arithmetic and memory takes."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class Card:
    """An accelerator, by its maker's figures: dense 16-bit arithmetic, memory bandwidth."""

    name: str = "H100 SXM"
    flops_per_second: float = 989e12
    bytes_per_second: float = 3.35e12


def estimate_cost(
    config: DeltaVLMConfig,
    *,
    pairs: int = 1,
    questions: int = 1,
    text_tokens: int = 32,
    instruction_tokens: int = 32,
    answer_tokens: int = 32,
    known_tokens: int = 0,
    weight_bytes: float = 2,
) -> list[Part]:
    """
    The parts of answering a batch of questions, greedily.

    Args:
        config ([`DeltaVLMConfig`]): with a language model of LLaMA's form.
        pairs (`int`, *optional*): image pairs that are encoded.
        questions (`int`, *optional*): questions in the batch, over all pairs.
        text_tokens (`int`, *optional*): of a prompt, without change tokens.
        instruction_tokens (`int`, *optional*): of a question, for the Q-Former.
        answer_tokens (`int`, *optional*): of an answer.
        known_tokens (`int`, *optional*): how many of a prompt's, change tokens among them, the language model's cache
            holds already.
        weight_bytes (`float`, *optional*): of one weight and of one cached value: 2 in 16 bits, 0.5 in 4.

    Returns:
        `list[Part]`: vision, difference, Q-Former, prompt, answer.

    Raises:
        ValueError: if the language model is of another form.
    """
    text = config.text_config
    if not all(hasattr(text, name) for name in ("num_key_value_heads", "intermediate_size", "rms_norm_eps")):
        raise ValueError(f"The cost of a {text.model_type!r} is not known: expected a language model of LLaMA's form.")
    vision, qformer = config.vision_config, config.qformer_config
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens, width = patches + 1, vision.hidden_size

    block = 4 * width**2 + 2 * width * vision.intermediate_size  # weights of its matrices
    embedding = 3 * vision.patch_size**2 * width
    vision_weights = vision.num_hidden_layers * block + embedding
    vision_flops = vision.num_hidden_layers * (2 * tokens * block + 4 * tokens**2 * width) + 2 * patches * embedding

    difference_weights = 7 * width**2 if config.difference_module == "csrm" else 0
    difference_flops = 24 * tokens * width**2 if config.difference_module == "csrm" else 0

    hidden, queries = qformer.hidden_size, config.num_query_tokens
    read = queries + instruction_tokens
    layers = qformer.num_hidden_layers
    crossing = -(-layers // qformer.cross_attention_frequency)
    feed_forward = 2 * hidden * qformer.intermediate_size
    qformer_weights = layers * (4 * hidden**2 + 2 * feed_forward) + crossing * (2 * hidden**2 + 2 * width * hidden)
    qformer_weights += hidden * text.hidden_size
    qformer_flops = layers * (2 * read * (4 * hidden**2 + feed_forward) + 4 * read**2 * hidden)
    qformer_flops += crossing * (4 * queries * hidden**2 + 8 * tokens * width * hidden + 8 * queries * tokens * hidden)
    qformer_flops += 2 * queries * hidden * text.hidden_size

    size = text.hidden_size
    head = getattr(text, "head_dim", None) or size // text.num_attention_heads
    attended, kept = head * text.num_attention_heads, head * text.num_key_value_heads
    layer = 2 * size * attended + 2 * size * kept + 3 * size * text.intermediate_size
    output = size * text.vocab_size
    language_weights = text.num_hidden_layers * layer + output
    prompt = queries + text_tokens
    new = prompt - known_tokens
    prompt_flops = text.num_hidden_layers * (2 * new * layer + 4 * new * prompt * attended) + 2 * output
    prompt_read = text.num_hidden_layers * 2 * kept * known_tokens
    steps = max(answer_tokens - 1, 0)  # the prompt's own step chooses the first token
    lengths = steps * prompt + steps * (steps + 1) / 2
    answer_flops = steps * 2 * (text.num_hidden_layers * layer + output)
    answer_flops += text.num_hidden_layers * 4 * attended * lengths
    cache_read = text.num_hidden_layers * 2 * kept * lengths
    return [
        Part(f"vision, {2 * pairs} images", 2 * pairs * vision_flops, weight_bytes * vision_weights),
        Part(f"difference, {pairs} pairs", pairs * difference_flops, weight_bytes * difference_weights),
        Part(f"Q-Former, {questions} questions", questions * qformer_flops, weight_bytes * qformer_weights),
        Part(
            f"prompts of {prompt} tokens",
            questions * prompt_flops,
            weight_bytes * (language_weights + questions * prompt_read),
        ),
        Part(
            f"answers of {answer_tokens} tokens",
            questions * answer_flops,
            weight_bytes * (steps * language_weights + questions * cache_read),
        ),
    ]


def cost_table(parts: list[Part], card: Card | None = None) -> str:
    """Markdown: each part's arithmetic, memory traffic and least time on a card, and its share of the whole time."""
    card = card or Card()
    seconds = [part.seconds(card.flops_per_second, card.bytes_per_second) for part in parts]
    lines = [f"| part | TFLOP | GB read | least ms ({card.name}) | share |", "|---|---:|---:|---:|---:|"]
    for part, time in zip(parts, seconds, strict=True):
        share = 100 * time / sum(seconds)
        lines.append(
            f"| {part.name} | {part.flops / 1e12:.3f} | {part.bytes / 1e9:.2f} | {1e3 * time:.2f} | {share:.0f} % |"
        )
    return "\n".join(lines)
