"""Some test sets are known by name, so that `generate.<name>` needs no keys. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

MATH_PROMPT = "Question: {%s}\nAnswer:\n"
"""GSM8K and MATH have this prompt, for training and for answers."""

TEST_SETS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        **{"source": "openai/gsm8k", "config": "main", "template": MATH_PROMPT % "question", "reference": "answer"},
        **{"score": "gsm8k", "max_new_tokens": 512, "stop": ["\nQuestion:"]},
    },
    "math": {
        **{"source": "DigitalLearningGmbH/MATH-lighteval", "config": "default", "template": MATH_PROMPT % "problem"},
        **{"reference": "solution", "score": "math", "max_new_tokens": 512, "stop": ["\nQuestion:"]},
    },
    "humaneval": {"source": "openai/openai_humaneval", "score": "code", "max_new_tokens": 512},
    "humanevalplus": {"source": "evalplus/humanevalplus", "score": "code", "max_new_tokens": 512},
    "mbpp": {"source": "google-research-datasets/mbpp", "config": "full", "score": "code", "max_new_tokens": 512},
    "mbppplus": {"source": "evalplus/mbppplus", "score": "code", "max_new_tokens": 512},
}
"""A known test set is asked so; `generate.<name>` may say otherwise. Its split is test.

Where the recipe was trained on a template with one place, a set's question takes that place, and its own template is
for a model that was trained on none.
"""

COMPLETED = ("humaneval", "humanevalplus")
"""The prompts of these sets are heads of functions, which a model trained on instructions is asked to complete."""
COMPLETE = ("Complete the function.\n\n{prompt}", "\n{prompt}")
"""The first takes the instruction's place there, and the answer begins with the second. Left to itself,
Qwen2.5-Coder-0.5B with a LoRA repeats the docstring until the limit, or stops behind it. It solved 1 of 20 problems,
and 8 with the head."""
COMPLETE_STOP = ["\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\n#", "\n```"]
