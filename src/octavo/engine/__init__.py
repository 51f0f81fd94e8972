"""Many requests at once over one attached model: `LLM` for users, `Engine.step` for readers.

`request` is one request's life, `scheduler` decides who runs next, `runner` runs the model on them, `sampling` turns
logits into tokens, `engine` ties them together, `llm` is the face.
"""

from octavo.engine.engine import Engine
from octavo.engine.llm import LLM
from octavo.engine.request import Output, Request
from octavo.engine.sampling import SamplingParams

__all__ = ["LLM", "Engine", "Output", "Request", "SamplingParams"]
