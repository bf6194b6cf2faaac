"""`deltavlm demo`: a generated pair, a model's answers about it, and a picture of both."""

import textwrap

from PIL import Image, ImageDraw, ImageFont

from ..data.questions import FOLLOW_UPS, INSTRUCTIONS, describe_in_detail
from ..data.rules import Thresholds, read_facts
from ..data.scenes import generate_scene
from ..inference import ChangeSession
from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor

CONVERSATION = (INSTRUCTIONS["binary"], FOLLOW_UPS[0])
SIDE, MARGIN, LINE = 384, 16, 22


def ask_and_draw(
    model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, seed: int, **generate_kwargs
) -> tuple[str, Image.Image]:
    """Asks the fixed tasks and a follow-up about one generated pair: the answers as text, and a picture with them."""
    scene = generate_scene(seed, size=processor.image_processor.size["height"])
    session = ChangeSession(model, processor, scene.before, scene.after)
    answers = session.ask_apart(list(INSTRUCTIONS.values()), **generate_kwargs)
    turns = list(zip(INSTRUCTIONS.values(), answers, strict=True))
    for question in CONVERSATION:
        session.ask(question, **generate_kwargs)
    facts = read_facts(scene.mask, Thresholds.for_size(len(scene.mask)))
    lines = [line for turn in turns for line in _format(*turn)]
    lines += ["", "A conversation:", *(line for turn in session.history for line in _format(*turn))]
    lines += ["", *textwrap.wrap(f"In truth: {describe_in_detail(facts)}", width=96)]
    return "\n".join(lines), draw(scene.before, scene.after, lines)


def _format(question: str, answer: str) -> list[str]:
    return [*textwrap.wrap(f"Q: {question}", width=96, subsequent_indent="   "), f"A: {answer}"]


def draw(before, after, lines: list[str]) -> Image.Image:
    """
    Both dates side by side and text below.

    Args:
        before (`np.ndarray` of shape `(H, W, 3)`, uint8): the first date.
        after (`np.ndarray` of shape `(H, W, 3)`, uint8): the second date.
        lines (`list[str]`): the text.
    """
    width = 2 * SIDE + 3 * MARGIN
    picture = Image.new("RGB", (width, SIDE + 3 * MARGIN + LINE * (len(lines) + 1)), "white")
    canvas = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=15)
    for column, (title, image) in enumerate((("before", before), ("after", after))):
        left = MARGIN + column * (SIDE + MARGIN)
        canvas.text((left, MARGIN // 2), title, fill="black", font=font)
        enlarged = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.paste(enlarged, (left, MARGIN + LINE))
    for row, line in enumerate(lines):
        colour = "#0b5394" if line.startswith("A:") else "black"
        canvas.text((MARGIN, SIDE + 2 * MARGIN + LINE * (row + 1)), line, fill=colour, font=font)
    return picture
