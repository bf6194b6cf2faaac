"""Data of ChangeChat-105k's form: load it, check it, build it, look at it; and generated scenes."""

from ..lazy import lazy_names

_MODULES = {
    "LEVIR": "rules",
    "TASKS": "questions",
    "ChangeClass": "classes",
    "Classes": "classes",
    "Facts": "rules",
    "PairCollator": "collator",
    "Record": "records",
    "ScenePair": "scenes",
    "Thresholds": "rules",
    "build_dataset": "build",
    "check_data": "check",
    "find_classes": "changechat",
    "find_objects": "rules",
    "find_pairs": "build",
    "generate_scene": "scenes",
    "load_changechat": "changechat",
    "load_generated": "generated",
    "load_mask": "rules",
    "make_turns": "questions",
    "read_classes": "classes",
    "read_facts": "rules",
    "read_records": "records",
    "undecoded": "rows",
    "write_dataset": "writing",
    "write_records": "records",
    "write_sheet": "show",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
