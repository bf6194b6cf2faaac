"""What a model says, for tests that compare it."""

GREEDY = {"num_beams": 1, "max_new_tokens": 8}


def answer_ids(model, inputs: dict, **kwargs) -> list[list[int]]:
    """The ids that `generate` adds to each prompt; at most six, the best at each step, unless told otherwise."""
    ids = model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **kwargs})
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def plain_answer(model, processor, pair, question, history) -> str:
    inputs = processor(images=pair, text=question, history=history, return_tensors="pt")
    ids = model.generate(**inputs, **GREEDY)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
