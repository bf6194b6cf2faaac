"""What a model says, for tests that compare it."""


def answer_ids(model, inputs: dict, **kwargs) -> list[list[int]]:
    """The ids that `generate` adds to each prompt; at most six, the best at each step, unless told otherwise."""
    ids = model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **kwargs})
    return ids[:, inputs["input_ids"].shape[1] :].tolist()
