"""Test sets that are known by name, so that `generate.<name>` needs no keys."""

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
"""The defaults of each known test set, whose split is `test`; `generate.<name>` may override them. Where the training
had a template with one column, the question takes the place of that column in it."""

COMPLETED = ("humaneval", "humanevalplus")
"""The prompts of these sets are signatures of functions; a model trained on instructions is asked to complete them."""
COMPLETE = ("Complete the function.\n\n{prompt}", "\n{prompt}")
"""The instruction, and the beginning of the answer. Without that beginning Qwen2.5-Coder-0.5B with a LoRA repeats the
docstring up to the limit, or stops after it; it solved 1 of 20 problems, and 8 with it."""
COMPLETE_STOP = ["\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\n#", "\n```"]
