"""Whether the PEFT that is installed goes with the installed Transformers."""

import peft
import pytest
import transformers
from packaging.version import parse
from transformers.integrations.peft import MIN_PEFT_VERSION

needs_peft = pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} asks for PEFT {MIN_PEFT_VERSION}, this is {peft.__version__}",
)
