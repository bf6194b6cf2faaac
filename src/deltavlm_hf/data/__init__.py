from .questions import TASKS, Facts, Record, make_record, read_facts
from .scenes import ScenePair, generate_scene

__all__ = ["TASKS", "Facts", "Record", "ScenePair", "generate_scene", "make_record", "read_facts"]
